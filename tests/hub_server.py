"""A server on 127.0.0.1 that accepts models like the Hugging Face hub, with faults on demand."""

import base64
import hashlib
import json
import re
from types import SimpleNamespace

import huggingface_hub
import yaml
from huggingface_hub.utils import _http

from tests.bad_server import Server

WRITE = {"role": "write"}
READ = {"role": "read"}
ID = r"[\w.-]+(/[\w.-]+)?"


def fine_grained(entity, *permissions, everywhere=()):
    """A token with permissions for one repository, user or organization, and some global ones."""
    scope = {"entity": {"_id": "0", "type": "user", "name": entity}, "permissions": list(permissions)}
    return {"role": "fineGrained", "fineGrained": {"global": list(everywhere), "scoped": [scope]}}


class HubServer(Server):
    """The hub of one user, "ann", with one token.

    Attributes:
        token: the token's entry in the response of whoami.
        created: bodies of the requests for new repositories.
        commits: (message, path -> bytes) of each commit, in order.
        lfs: the paths that were uploaded through LFS.
        card_checks: the errors found in each card that it was asked to check.
    """

    def __init__(self):
        self.token = WRITE
        self.created = []
        self.commits = []
        self.lfs = set()
        self.card_checks = []
        self._objects = {}
        super().__init__()

    def heal(self):
        super().heal()
        self.token = WRITE
        for record in (self.created, self.commits, self.lfs, self.card_checks, self._objects):
            record.clear()

    def hub_answer(self, handler, path, content):
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "ann", "auth": {"type": "access_token", "accessToken": self.token}}
        if path == "/api/repos/create":
            self.created.append(json.loads(content))
            owner = self.created[-1]["organization"] or "ann"
            return {"url": f"{self.url}/{owner}/{self.created[-1]['name']}"}
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in card_errors(json.loads(content)["content"])]
            self.card_checks.append(errors)
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if re.fullmatch(r"/api/models/ann/[^/]+/preupload/main", path):
            files = json.loads(content)["files"]
            return {
                "files": [
                    {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False} for file in files
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for object in objects:
                names = ("upload", "verify")
                object["actions"] = {name: {"href": f"{self.url}/{name}/{object['oid']}"} for name in names}
            return {"transfer": "basic", "objects": objects}
        if path.startswith("/upload/"):
            assert hashlib.sha256(content).hexdigest() == path.removeprefix("/upload/")
            self._objects[path.removeprefix("/upload/")] = content
            return {}
        if path.startswith("/verify/"):
            return {}
        if re.fullmatch(r"/api/models/ann/[^/]+/commit/main", path):
            header, *entries = map(json.loads, content.decode().splitlines())
            files = {}
            for entry in entries:
                value = entry["value"]
                if entry["key"] == "lfsFile":
                    self.lfs.add(value["path"])
                    files[value["path"]] = self._objects[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            self.commits.append((header["value"]["summary"], files))
            return {
                "commitUrl": f"{self.url}/{path.split('/', 3)[3].split('/commit')[0]}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
            }
        return None


def mode(path):
    return "lfs" if path.endswith((".safetensors", ".png")) or "tfevents" in path else "regular"


def card_errors(text):
    """Yields violations of the hub's documentation of model cards."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not match:
        yield "there is no metadata"
        return
    data = yaml.safe_load(match[1])
    lists = {"tags": r"[\w./:-]+", "datasets": ID, "base_model": ID, "language": r"[a-z]{2,3}(-\w+)?"}
    for key, pattern in lists.items():
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not (isinstance(values, list) and all(isinstance(v, str) and re.fullmatch(pattern, v) for v in values)):
            yield f"{key} is {values!r}"
    for key in ("license", "library_name", "pipeline_tag"):
        if not re.fullmatch(r"[a-z0-9.-]+", data.get(key, "none")):
            yield f"{key} is {data[key]!r}"
    for model in data.get("model-index", ()):
        if not (isinstance(model.get("name"), str) and model["name"] and model.get("results")):
            yield f"model-index has {model!r}"
            continue
        for result in model["results"]:
            if not result.get("task", {}).get("type"):
                yield "a result has no task.type"
            if not (result.get("dataset", {}).get("name") and re.fullmatch(ID, result["dataset"].get("type", ""))):
                yield f"a result has the dataset {result.get('dataset')!r}"
            for metric in result.get("metrics", ()):
                if not (metric.get("type") and isinstance(metric.get("value"), int | float)):
                    yield f"a result has the metric {metric!r}"


def use(server, monkeypatch, folder):
    """Points the real huggingface_hub in this process to a server, without its waits between retries."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("HF_TOKEN", f"hf_{server.port}")
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
