"""The report of the ablation matrix in a browser."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "examples" / "ablation_toy.yaml"

pytestmark = pytest.mark.verify
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small matrix on the toy, trained by the command."""
    root = tmp_path_factory.mktemp("matrix")
    command = [sys.executable, "-m", "examples.ablation_matrix", "--config", str(TOY)]
    subprocess.run([*command, "--output_dir", str(root / "out")], check=True, cwd=ROOT)
    return root / "out" / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_report_in_chromium(report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """It renders without an error or a request, fits the screen, and its table sorts."""
    sync_api = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        assert page.locator(".plots svg path").count() > 10
        assert page.locator(".pictures img").count() > 2
        assert all(page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 0)"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = max(map(int, re.findall(r"\d+", background))) > 128
        assert bright == (scheme == "light")

        heads = page.locator("#all thead button")
        column = heads.all_inner_texts().index("reward/total")
        values = f"[...document.querySelectorAll('#all tbody tr')].map(r => +r.cells[{column}].dataset.value)"
        heads.nth(column).click()
        rising = page.evaluate(values)
        heads.nth(column).click()
        falling = page.evaluate(values)
        assert rising == sorted(rising) == falling[::-1]
        assert len(set(rising)) > 1
        page.screenshot(path=str(tmp_path / f"report-{width}-{scheme}.png"), full_page=True)
        print(f"\n{tmp_path}/report-{width}-{scheme}.png")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
