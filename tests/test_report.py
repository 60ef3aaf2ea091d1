"""The page of --mode=report: its data, and in a real browser its plots, tables and controls."""

import http.server
import json
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import save_curve
from configs import default
from mlm import train
from mlm.errors import UserError
from mlm.modes import report
from mlm.reporting import writers
from mlm.run.workdir import WorkDir
from tests import fork_server
from tests.tiny import settings_of

ROOT = Path(__file__).parent.parent
DEFAULTS = settings_of(default.get_config()).flat()


def write_run(folder, *, steps=40, skipped=None, restarts=(), values=None, loss=5.0):
    """A work directory with a log line every 10 steps and an evaluation every 20. A step: 1,000 tokens, 3 minutes."""
    folder.mkdir(parents=True)
    config = default.get_config()
    config.num_train_steps = 40
    for key, value in (values or {}).items():
        config.update_from_flattened_dict({key: value})
    starts = [(0, "start", {}), *((step, "restart", changed) for step, changed in restarts)]
    history = [
        {"step": step, "time": "2026-11-22T10:00:00+00:00", "event": event, "changed": changed}
        for step, event, changed in starts
    ]
    content = {"format_version": 1, "config": settings_of(config).flat(), "history": history}
    (folder / "config.json").write_text(json.dumps(content))
    lines = []
    for step in range(10, steps + 1, 10):
        line = {
            "step": step,
            "train/loss": loss - step / 100,
            "train/accuracy": 0.25,
            "train/learning_rate": 1e-3,
            "train/skipped_steps": sum(count for at, count in (skipped or {}).items() if at <= step),
            "data/tokens": 1000 * step,
            "perf/hours": step / 20,
            "perf/tokens_per_second": 100.0 * step,
            "perf/input_wait_fraction": 0.02,
        }
        if step % 20 == 0:
            line |= {
                "eval/loss": loss - step / 50,
                "eval/accuracy": 0.3,
                "eval/perplexity": 50.0,
                "eval/unigram_loss": 6.0,
            }
        lines.append(line)
    # An evaluation alone, as when logging_steps and eval_steps differ.
    lines.insert(2, {"step": 25, "eval/loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def write_page(path, *workdirs):
    report.run(None, workdirs, output=str(path), defaults=DEFAULTS)
    return path.read_text(encoding="utf-8")


def data_of(html):
    return json.loads(re.search(r"^const page = (.*);$", html, re.MULTILINE)[1])


def test_curves_are_the_metrics_with_tokens_and_hours(tmp_path):
    run = report.read_run(WorkDir(write_run(tmp_path / "a")), "a")
    assert run["curves"]["train/loss"] == {
        "steps": [10, 20, 30, 40],
        "tokens": [10_000, 20_000, 30_000, 40_000],
        "hours": [0.5, 1.0, 1.5, 2.0],
        "values": [4.9, 4.8, 4.7, 4.6],
    }
    # Interpolated between two lines that have tokens and hours.
    assert run["curves"]["eval/loss"] == {
        "steps": [20, 25, 40],
        "tokens": [20_000, 25_000, 40_000],
        "hours": [1.0, 1.25, 2.0],
        "values": [4.6, 5.0, 4.2],
    }


def test_tokens_and_hours_are_extrapolated_after_the_last_line_that_has_them():
    lines = [{"step": 10, "data/tokens": 100, "perf/hours": 1.0}, {"step": 15, "eval/loss": 1.0}]
    axes = report._axes(lines, [5, 10, 15])
    assert axes == {"steps": [5, 10, 15], "tokens": [50, 100, 150], "hours": [0.5, 1.0, 1.5]}
    assert report._axes([{"step": 15, "eval/loss": 1.0}], [15]) == {"steps": [15], "tokens": [0], "hours": [0]}


def test_restarts_and_skipped_steps_are_events(tmp_path):
    changed = {"optimizer.learning_rate": [1e-3, 1e-4]}
    run = report.read_run(WorkDir(write_run(tmp_path / "a", skipped={20: 2, 40: 1}, restarts=[(15, changed)])), "a")
    assert run["events"] == [
        {
            "kind": "restart",
            "text": "restart after step 15, 2026-11-22 10:00; optimizer.learning_rate: 0.001 to 0.0001",
            "steps": 15,
            "tokens": 15_000,
            "hours": 0.75,
        },
        {"kind": "skip", "text": "2 skipped in steps 11 to 20", "steps": 20, "tokens": 20_000, "hours": 1.0},
        {"kind": "skip", "text": "1 skipped in steps 31 to 40", "steps": 40, "tokens": 40_000, "hours": 2.0},
    ]


def test_the_table_of_final_metrics(tmp_path):
    folder = write_run(tmp_path / "a", skipped={30: 2}, restarts=[(5, {})])
    figures = dict(report.read_run(WorkDir(folder), "a")["figures"])
    assert figures["Steps"] == "40 of 40"
    assert figures["Eval loss"] == "4.200"
    assert figures["Best eval loss"] == "4.200 at step 40"
    assert figures["Tokens seen"] == "40,000"
    assert figures["Hours"] == "2.00"
    assert figures["Tokens per second, median"] == "2,500"
    assert figures["Input wait, median"] == "2.0 %"
    assert (figures["Skipped steps"], figures["Restarts"]) == ("2", "1")
    assert figures["Utilization, median"].startswith("-")


def test_the_config_table_lists_differing_keys_first_those_that_differ_between_runs(tmp_path):
    a = write_run(tmp_path / "a", values={"seed": 1, "model.dtype": "bfloat16"})
    b = write_run(tmp_path / "b", values={"seed": 2, "model.dtype": "bfloat16"})
    keys = data_of(write_page(tmp_path / "page.html", a, b))["keys"]
    assert keys == [
        {"key": "seed", "default": "42", "values": ["1", "2"], "differs": True},
        {"key": "model.dtype", "default": '"float32"', "values": ['"bfloat16"', '"bfloat16"'], "differs": False},
        {"key": "num_train_steps", "default": "50000", "values": ["40", "40"], "differs": False},
    ]


def test_long_curves_are_thinned_evenly_and_keep_their_last_point(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_POINTS", 2)
    run = report.read_run(WorkDir(write_run(tmp_path / "a", steps=50)), "a")
    assert run["curves"]["train/loss"]["steps"] == [20, 50]


def test_runs_have_the_shortest_distinct_names(tmp_path):
    first, second = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    page = data_of(write_page(tmp_path / "page.html", first, second))
    assert [run["name"] for run in page["runs"]] == ["x/run", "y/run"]


def test_the_page_loads_nothing_and_escapes_names(tmp_path):
    name = "<img src=x>&</script><script>"
    folder = tmp_path / name.replace("/", "_")
    html = write_page(tmp_path / "page.html", write_run(folder))
    assert "default-src 'none'" in html
    assert "<img" not in html[html.index("const page") :]
    assert data_of(html)["runs"][0]["name"] == folder.name


def test_a_stored_curve_is_drawn_beside_a_run(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    write_run(tmp_path / "stored", loss=6.0)
    monkeypatch.setattr(report, "CURVES", str(tmp_path / "curves"))
    (tmp_path / "curves").mkdir()
    save_curve.main(str(tmp_path / "stored"), str(tmp_path / "curves" / "small.jsonl"))
    output = tmp_path / "page.html"
    for reference in ("small", str(tmp_path / "curves" / "small.jsonl")):
        report.run(None, [str(tmp_path / "run")], output=str(output), reference=reference, defaults=DEFAULTS)
        stored = report.read_reference(reference)
        assert stored["name"] == "reference small"
        assert stored["curves"] == report.read_run(WorkDir(str(tmp_path / "stored")), "x")["curves"]
        assert '"reference small"' in output.read_text()
    with pytest.raises(UserError, match=r"^--reference=large: no such file; stored curves are small$"):
        report.read_reference("large")
    for content in ('{"step": 1}\n{"step": 2}\n', "", '{"step": 0, "history": []}\n'):
        (tmp_path / "curves" / "other.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"is not a stored curve; write one with benchmarks/save_curve\.py$"):
            report.read_reference("other")


def test_user_errors(tmp_path):
    run = write_run(tmp_path / "a")
    page = str(tmp_path / "page.html")
    with pytest.raises(UserError, match="contains no run"):
        report.run(None, [str(tmp_path / "b")], output=page, defaults=DEFAULTS)
    with pytest.raises(UserError, match="the same run is given twice"):
        report.run(None, [run, run + "/"], output=page, defaults=DEFAULTS)
    with pytest.raises(UserError, match="cannot be written"):
        report.run(None, [run], output=str(tmp_path / "no" / "page.html"), defaults=DEFAULTS)
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics yet"):
        report.run(None, [run], output=page, defaults=DEFAULTS)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    runs = [f"--workdir={write_run(tmp_path / name)}" for name in "ab"]

    def main(*words):
        command = [sys.executable, str(ROOT / "main.py"), *words]
        return fork_server.run(command, cwd=tmp_path)

    done = main("--mode=report", *runs)
    assert (done.returncode, (tmp_path / "report.html").exists()) == (0, True), done.stderr
    assert "the report of a, b is in report.html" in done.stderr
    done = main("--config=" + str(ROOT / "configs" / "quickstart.py"), *runs)
    assert done.returncode == 2
    assert done.stderr == "error: --workdir: was given 2 times; only --mode=report takes several runs\n"


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", skipped={20: 1}, restarts=[(15, {"seed": [1, 2]})])
    second = write_run(folder / "second", loss=6.0, values={"seed": 7})
    write_page(folder / "page.html", first, second)
    return folder / "page.html"


@pytest.fixture
def opened(browser, page):
    """The page in a wide window, light."""
    look(browser, page)
    return browser


def look(browser, page, *, width=1200, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(page.as_uri())


def plots(browser, what):
    """Evaluates an expression for every plot `p` once it is drawn; by title."""
    browser.execute_async_script("drawn.then(() => requestAnimationFrame(() => setTimeout(arguments[0])))")
    return browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.panel')].map((box) =>"
        f" [box.querySelector('h2').firstChild.data, ((p) => {what})(box.querySelector('.plot'))]))"
    )


def luminance(browser, css, element="body"):
    color = browser.execute_script(f"return getComputedStyle(document.querySelector('{element}')).{css}")
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
@pytest.mark.browser
def test_every_panel_draws_its_curves_and_the_browser_logs_no_error(opened):
    titles = ["Loss", "Accuracy", "Learning rate", "Throughput", "Input wait", "Skipped steps"]
    assert plots(opened, "0").keys() == set(titles)
    drawn = plots(opened, "[...p.querySelectorAll('.scatterlayer .trace')].length")
    # Two runs with train, eval and unigram loss each, and the skipped steps of one.
    assert drawn == {"Loss": 7, "Accuracy": 4} | dict.fromkeys(titles[2:], 2)
    assert all(plots(opened, "p.querySelector('.lines path').getTotalLength() > 50").values())
    assert opened.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_requests_nothing_but_itself(browser, page):
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=page.parent)

        def log_request(self, *args):
            requested.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/page.html")
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        server.shutdown()
    assert plots(browser, "p.data.length")["Loss"] == 7
    # The browser itself requests a site icon.
    assert [path for path in requested if path != "/favicon.ico"] == ["/page.html"]
    assert [name for name in loaded if not name.endswith("/favicon.ico")] == []


@pytest.mark.slow
@pytest.mark.browser
def test_the_horizontal_axis_switches(opened):
    shown = {}
    for axis in ("steps", "tokens", "hours"):
        opened.execute_script(f"document.querySelector('[data-axis={axis}]').click()")
        loss = plots(opened, "[p.data[0].x, p.layout.xaxis.title.text, p.layout.shapes[0].x0]")["Loss"]
        shown[axis] = loss
    assert shown == {
        "steps": [[10, 20, 30, 40], "steps", 15],
        "tokens": [[10_000, 20_000, 30_000, 40_000], "tokens", 15_000],
        "hours": [[0.5, 1, 1.5, 2], "hours", 0.75],
    }


@pytest.mark.slow
@pytest.mark.browser
def test_smoothing_draws_an_unbiased_moving_average_beside_the_points(opened):
    opened.execute_script(
        "const s = document.querySelector('#smoothing'); s.value = 0.5; s.dispatchEvent(new Event('input'))"
    )
    raw, smooth = plots(opened, "p.data.slice(0, 2).map((trace) => trace.y)")["Loss"]
    weights = [0.5**age for age in range(4)]
    expected = [
        sum(w * value for w, value in zip(weights, raw[i::-1], strict=False)) / sum(weights[: i + 1]) for i in range(4)
    ]
    assert raw == pytest.approx([4.9, 4.8, 4.7, 4.6])
    assert smooth == pytest.approx(expected)
    # Evaluations are not smoothed.
    evaluations = plots(opened, "p.data.filter((t) => t.name === 'first eval').map((t) => t.y)")
    assert evaluations["Loss"] == [[4.6, 5.0, 4.2]]


@pytest.mark.slow
@pytest.mark.browser
def test_values_show_on_hover(opened):
    opened.execute_script(
        "const p = document.querySelector('.plot'); window.scrollTo(0, 0);"
        "Plotly.Fx.hover(p, [{curveNumber: 0, pointNumber: 1}])"
    )
    hover = opened.execute_script("return document.querySelector('.plot .hoverlayer').textContent")
    assert "first train" in hover
    assert "4.8" in hover


@pytest.mark.slow
@pytest.mark.browser
def test_skipped_steps_and_restarts_are_marked(opened):
    crosses = plots(opened, "p.data.filter((t) => t.name === 'skipped').map((t) => [t.x, t.y, t.text])")["Loss"]
    assert crosses == [[[20], [4.8], ["1 skipped in steps 11 to 20"]]]
    assert all(value == 1 for value in plots(opened, "p.querySelectorAll('.shapelayer path').length").values())
    events = opened.execute_script("return document.querySelector('#events').innerText")
    assert "restart after step 15" in events
    assert "seed: 1 to 2" in events


@pytest.mark.slow
@pytest.mark.browser
def test_a_run_can_be_hidden(opened):
    opened.execute_script("document.querySelector('#runs button').click()")
    names = plots(opened, "p.data.map((t) => t.name)")["Loss"]
    assert names == ["second train", "second eval", "second unigram model"]


@pytest.mark.slow
@pytest.mark.browser
def test_the_tables(opened):
    figures = opened.execute_script("return document.querySelector('#figures').innerText")
    assert re.search(r"Eval loss\s+4\.200\s+5\.200", figures)
    assert "Utilization" not in figures
    rows = opened.execute_script("return [...document.querySelectorAll('#config tr.differs')].map((r) => r.innerText)")
    assert [row.split() for row in rows] == [["seed", "42", "7", "42"]]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_browser_and_can_be_switched(browser, page, scheme):
    look(browser, page, scheme=scheme)
    contrasts = []
    for _ in range(2):
        contrasts.append(luminance(browser, "color") - luminance(browser, "backgroundColor"))
        axis = plots(browser, "getComputedStyle(p.querySelector('.xtick text')).fill")["Loss"]
        assert axis == browser.execute_script("return getComputedStyle(document.body).color")
        browser.execute_script("document.querySelector('#theme').click()")
    light, dark = contrasts if scheme == "light" else contrasts[::-1]
    assert light < -150
    assert dark > 150


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_fits_the_width_of_a_phone(browser, page):
    look(browser, page, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    widths = plots(browser, "p.querySelector('svg').getBoundingClientRect().width")
    assert all(300 < width <= 390 for width in widths.values())
    size = browser.execute_script("return parseFloat(getComputedStyle(document.querySelector('#figures td')).fontSize)")
    assert size >= 14


def test_the_pauses_have_the_names_that_the_training_loop_uses():
    loop = Path(train.__file__).read_text()
    called = {f"perf/{name}_ms" for name in re.findall(r'reporter\.timed\("(\w+)"\)', loop)}
    panels = {title: {metric for metric, _ in curves} for title, _, curves, _ in report.PANELS}
    assert panels["Pauses"] <= called
    charts = {name for tags in writers._CHARTS.values() for name in tags if "evaluation" in name or "save" in name}
    assert charts <= called
