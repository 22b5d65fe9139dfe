"""The report in a real browser: it is drawn, fits a phone, and asks nothing of any network."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.report.render import write_report
from tests.run_folder import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)

Pixels = npt.NDArray[np.int16]


def shot(html: Path, width: int, height: int, *flags: str) -> Pixels:
    """What a window of that size shows, (height, width, 3)."""
    target = html.with_suffix(".png")
    profile = html.parent / "profile"
    command = [str(CHROMIUM), *_FLAGS, *flags, f"--user-data-dir={profile}"]
    command += [f"--window-size={width},{height}", f"--screenshot={target}", html.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    assert pixels.shape == (height, width, 3)
    return pixels


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(make_run(str(tmp_path / "run")), tmp_path / "report.html")


def test_it_is_drawn_in_light_and_dark(report: Path) -> None:
    light = shot(report, 1280, 1600)
    dark = shot(report, 1280, 1600, "--force-dark-mode")
    assert light[0, 0].min() > 235 and dark[0, 0].max() < 60
    for pixels in (light, dark):
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
        # Text, bars and cards down to the bottom of the window.
        rows = np.ptp(pixels, axis=1).max(axis=1) > 40
        assert rows[:800].mean() > 0.2 and rows[800:].mean() > 0.2


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_runs_over_the_edge(report: Path, width: int) -> None:
    pixels = shot(report, width, 9000)
    for edge in (pixels[:, :10], pixels[:, -10:]):
        assert int(np.ptp(edge, axis=1).max()) == 0


@pytest.fixture
def outside() -> Iterator[tuple[str, list[str]]]:
    """An address that a page could ask, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_not_even_markup_that_slipped_in_could_call_home(
    report: Path, outside: tuple[str, list[str]]
) -> None:
    address, asked = outside
    html = report.read_text("utf-8")
    bad = (
        f'<img src="{address}/image"><link rel="stylesheet" href="{address}/style">'
        f'<script src="{address}/script"></script>'
        f'<script>new Image().src="{address}/inline"</script>'
        f'<iframe src="{address}/frame"></iframe><p style="background:url({address}/css)">x</p>'
        f'<video src="{address}/video" autoplay></video><object data="{address}/object"></object>'
    )
    report.write_text(html.replace("<main", f"{bad}<main", 1), "utf-8")
    shot(report, 1280, 400)
    assert asked == []
    # The same without the page's policy, to show that these do ask.
    head, _, rest = html.partition('<meta http-equiv="Content-Security-Policy"')
    free = head + rest.partition(">")[2]
    report.write_text(free.replace("<main", f"{bad}<main", 1), "utf-8")
    shot(report, 1280, 400)
    assert {"/image", "/style", "/script", "/inline", "/frame", "/css"} <= set(asked)
