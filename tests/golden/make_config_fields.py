"""Prints the fields of the families' config classes and their defaults, for tests/golden/config_fields.json.

Run it in an environment with the version of transformers to add; the group "all" has the fields of all families:

    /tmp/transformers4/bin/python tests/golden/make_config_fields.py
"""

import json

import transformers

FAMILIES = (
    "roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "bert", "distilbert", "electra", "albert",
    "roformer", "modernbert",
)  # fmt: skip


def main() -> None:
    base_class = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
    common = base_class().to_dict()
    groups = {"all": common}
    for family in FAMILIES:
        fields = transformers.AutoConfig.for_model(family).to_dict()
        groups[family] = {name: value for name, value in fields.items() if (name, value) not in common.items()}
    for fields in groups.values():
        for name in ("transformers_version", "_name_or_path"):
            fields.pop(name, None)
    lines = ",\n".join(f"  {json.dumps(group)}: {json.dumps(fields)}" for group, fields in groups.items())
    print(f"{json.dumps(transformers.__version__)}: {{\n{lines}\n}}")


if __name__ == "__main__":
    main()
