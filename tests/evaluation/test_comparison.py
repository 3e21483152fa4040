"""The comparison page: what it holds, and what a reader can do with it in a browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmdr.errors import ConfigError
from dmdr.evaluation.comparison import Shown, _choose, _embed, write_comparison
from dmdr.evaluation.pictures import Files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (apt-get install chromium)")

EVIL = '</script><b>bold</b> "quoted" {{ 7 * 7 }} <!-- <script> & it\'s'
NONE = Files(Path(), [])
PROMPTS = ["a red fox", "a blue whale", EVIL, "a red kite at sea"]
# Differences of B: +0.5, -0.25, none, 0; ranges of all: 0.5, 0.75, 0.1, 0.
HPS = {"A": [0.25, 0.5, float("nan"), 0.125], "B": [0.75, 0.25, 0.5, 0.125], EVIL: [0.5, 1.0, 0.6, 0.125]}


def drawn(folder: Path, models: int, count: int) -> list[Files]:
    """A file for each model and row: 64 px of noise, none like another."""
    random = np.random.default_rng(0)
    files = [[folder / f"{model}-{row}.png" for row in range(count)] for model in range(models)]
    for path in (path for row in files for path in row):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return [Files(folder, paths) for paths in files]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Shown]:
    """Three models; the last has one score only, and the name of an enemy."""
    files = drawn(tmp_path_factory.mktemp("images"), len(HPS), len(PROMPTS))
    clip = {"clip": torch.tensor([24.0, 25.0, 26.0, 27.0])}
    return [
        Shown(name, f"drawn by {name}", images, {"hps": torch.tensor(HPS[name])} | ({} if name == EVIL else clip))
        for name, images in zip(HPS, files, strict=True)
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, models: list[Shown]) -> Path:
    """Their page."""
    path = tmp_path_factory.mktemp("page") / "new" / "comparison.html"
    table = [["Model", "hps"], ["A", "0.29 \u00b1 0.01"], [EVIL, EVIL]]
    write_comparison(path, f"A and B {EVIL}", PROMPTS, models, [("Means.", table)], notes=["Seed 0.", EVIL])
    assert [each.name for each in path.parent.iterdir()] == ["comparison.html"]
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page in a browser, which must hear no error and no request."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, said = context.new_page(), watch(context)
    page.goto(file.as_uri())
    yield page
    context.close()
    assert said == []


def watch(context: Any) -> list[str]:
    """What pages say to the console and ask of a network."""
    said: list[str] = []
    context.on("console", lambda message: said.append(message.text))
    context.on("weberror", lambda error: said.append(str(error.error)))
    context.on("request", lambda request: said.append(request.url) if request.url.startswith(("http", "ws")) else None)
    return said


def order(page: Any) -> list[int]:
    """Numbers of the rows that can be seen."""
    return [int(text) for text in page.locator("article:visible .number").all_inner_texts()]


def view(page: Any, name: str) -> None:
    page.locator(f"[name=view][value='{name}']").dispatch_event(
        "click"
    )  # a page that still scrolls would move from under the mouse


def seen(page: Any, row: int = 0) -> list[str]:
    """Models of a row whose image is visible."""
    images = page.locator("article").nth(row).locator("img:visible")
    return [alt.partition(" of ")[2] for alt in images.evaluate_all("all => all.map(image => image.alt)")]


# --- Without a browser ------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, models: list[Shown]) -> None:
    path = tmp_path / "page.html"

    def refused(prompts: list[str], models: list[Shown], words: str, max_rows: int = 100) -> None:
        with pytest.raises(ConfigError, match=words) as raised:
            write_comparison(path, "title", prompts, models, max_rows=max_rows)
        assert "\n" not in str(raised.value) and not list(tmp_path.glob("*.html"))

    a = models[0]
    refused(PROMPTS, [], "needs a model")
    refused([], [Shown("A", "", NONE)], "needs a prompt")
    refused(PROMPTS, [a, a], "two models are called 'A'")
    refused(PROMPTS[:3], [a], "'A' has 4 images for 3 prompts")
    refused(
        PROMPTS, [Shown("A", "", a.images, {"hps": torch.zeros(4, 1)})], r"'hps' of model 'A' has the shape \[4, 1\]"
    )
    refused(PROMPTS, [a], "1 row and 1 pixel", max_rows=0)
    assert isinstance(a.images, Files)
    broken = tmp_path / "torn.png"
    broken.write_bytes(a.images.paths[0].read_bytes()[:200])
    pictures = Files(tmp_path, [*a.images.paths[:3], broken])
    refused(PROMPTS, [Shown("A", "", pictures)], "torn.png cannot be read")


def test_of_many_rows_the_page_says_which_it_shows() -> None:
    a = torch.zeros(640)
    b = torch.linspace(-1, 1, 640)
    b[5] = float("nan")
    models = [
        Shown("A", "", NONE, {"first": a}),
        Shown("B", "", NONE, {"second": a, "hps": b}),
        Shown("C", "", NONE, {"hps": a}),
    ]
    rows, words = _choose(models, 640, 100)
    losses = set(range(607, 640))  # C minus B falls
    gains = set(range(34)) - {5}
    assert len(rows) == len(set(rows)) == 100 and rows == sorted(rows)
    assert losses | gains <= set(rows)
    assert words == (
        "100 of 640 prompts are shown: the 33 with the largest gain of C over B in hps, the 33 with the largest loss, "
        "and 34 drawn at random."
    )
    drawn = sorted(set(rows) - losses - gains)
    assert drawn == sorted(set(_choose(models, 640, 100)[0]) - losses - gains) and min(np.diff(drawn)) < max(
        np.diff(drawn)
    )

    few = [Shown("A", "", NONE, {"hps": torch.zeros(20)}), Shown("B", "", NONE, {"hps": torch.eye(20)[7]})]
    rows, words = _choose(few, 20, 9)
    assert 7 in rows and len(rows) == 9
    assert "the 1 with the largest gain of B over A in hps, the 0 with the largest loss, and 8 drawn" in words
    nothing = [Shown(name, "", NONE, {"hps": torch.full((20,), float("nan"))}) for name in "AB"]
    assert _choose(nothing, 20, 9) == (list(range(9)), "9 of 20 prompts are shown: the first 9.")
    assert _choose(few, 20, 20) == (list(range(20)), "")


def test_images_are_made_smaller_and_small_ones_stay_exact(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 3), dtype=np.uint8)
    for size, expected in (
        ((1024, 300), (512, 150, False)),
        ((500, 900), (500, 900, False)),
        ((64, 32), (64, 32, True)),
    ):
        Image.fromarray(pixels).resize(size).save(tmp_path / "image.png")
        tile = _embed(Files(tmp_path, [tmp_path / "image.png"]), 0, 512)
        assert tile.uri.startswith("data:image/webp;base64,")
        assert (tile.width, tile.height, tile.small) == expected


def test_the_same_images_give_the_same_page(tmp_path: Path, models: list[Shown]) -> None:
    pages = []
    for name in ("one", "two"):
        write_comparison(tmp_path / name, "title", PROMPTS, models[:2], max_rows=2)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_hostile_text_is_escaped(file: Path) -> None:
    html = file.read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script>") == 2  # the data and the code
    assert "<b>" not in html and "<!--" not in html
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert data["models"][2] == EVIL and "NaN" not in json.dumps(data)


# --- In a browser -----------------------------------------------------------------------------------------------------


@needs_browser
def test_it_shows_images_scores_and_differences(page: Any) -> None:
    assert page.locator("h1").inner_text() == f"A and B {EVIL}"
    assert page.locator(".prompt").nth(2).inner_text() == EVIL
    assert page.locator("tbody th").nth(1).inner_text() == page.locator("tbody td").nth(1).inner_text() == EVIL
    assert page.locator("main b").count() == 0
    assert page.locator("img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth === 64)")
    assert page.locator("img").first.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    assert page.locator("img").first.evaluate("i => i.clientWidth") > 128

    def captions(row: int) -> list[str]:
        return [
            " ".join(text.split()) for text in page.locator("article").nth(row).locator(".scores").all_inner_texts()
        ]

    assert captions(0) == [
        "hps 0.2500 clip 24.000",
        "hps 0.7500 \u25b2 +0.5000 clip 24.000 = 0.000",
        "hps 0.5000 \u25b2 +0.2500",
    ]
    assert captions(1)[1].startswith("hps 0.2500 \u25bc \u22120.2500")
    assert captions(2)[:2] == ["hps \u2013 clip 26.000", "hps 0.5000 clip 26.000 = 0.000"]
    page.locator("[name=a]").select_option("1")  # also as [name=b], which takes A then
    assert page.locator("[name=b]").input_value() == "0"
    assert captions(0)[0] == "hps 0.2500 \u25bc \u22120.5000 clip 24.000 = 0.000"


@needs_browser
def test_it_sorts_and_searches(page: Any) -> None:
    def sorted_by(name: str) -> list[int]:
        page.locator("[name=sort]").select_option(name)
        return order(page)

    assert order(page) == [1, 2, 3, 4]
    assert sorted_by("gain") == [1, 4, 2, 3]  # the row without a score is the last
    assert sorted_by("loss") == [2, 4, 1, 3]
    assert "Sorted by hps: the largest loss of B against A first." in page.locator("#state").inner_text()
    assert sorted_by("range") == [2, 1, 3, 4]
    page.locator("[name=b]").select_option("2")
    assert sorted_by("gain") == [2, 1, 4, 3]
    page.locator("[name=score]").select_option("1")  # which the third has not
    assert sorted_by("loss") == [1, 2, 3, 4]

    page.locator("[name=search]").fill("RED a")
    assert order(page) == [1, 4]
    assert page.locator("#state").inner_text().startswith("2 of 4 rows.")
    page.locator("[name=search]").fill("</script><b>")
    assert order(page) == [3]
    page.locator("[name=search]").fill("green")
    assert order(page) == [] and page.locator("#none").is_visible()
    page.locator("[name=search]").fill("")
    assert sorted_by("prompts") == [1, 2, 3, 4] and page.locator("#none").is_hidden()


@needs_browser
def test_the_slider_moves_by_mouse_and_keyboard(page: Any) -> None:
    view(page, "slider")
    assert seen(page) == ["A", "B"]
    slider, image = page.locator(".cut").first, page.locator("article .b img").first
    image.evaluate("i => i.scrollIntoView({ block: 'center' })")
    box = image.bounding_box()
    assert box == page.locator("article .a img").first.bounding_box()

    def clip() -> float:
        return float(image.evaluate("i => getComputedStyle(i).clipPath").split()[-1].rstrip("%)"))

    assert clip() == 50
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.8 * box["height"])
    assert clip() == pytest.approx(25, abs=1.5)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 10)
    page.mouse.up()
    assert clip() == pytest.approx(75, abs=1.5)
    before = clip()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert clip() == before - 1
    page.keyboard.press("Home")
    assert clip() == 0
    assert page.locator(".images").nth(1).evaluate("i => i.style.getPropertyValue('--cut')") == ""  # its own


@needs_browser
def test_it_flips_by_key_click_and_button(page: Any) -> None:
    page.keyboard.press("Space")  # scrolls only
    view(page, "flip")
    page.locator("[name=b]").select_option("2")
    page.locator("h1").click()
    assert seen(page) == ["A"]
    page.keyboard.press("Space")
    assert seen(page) == seen(page, 3) == [EVIL]
    assert page.locator(".images").first.get_attribute("data-front") == EVIL
    page.keyboard.press("ArrowLeft")
    assert seen(page) == ["A"]
    page.keyboard.press("Control+ArrowLeft")
    assert seen(page) == ["A"]
    page.locator("article img:visible").nth(1).click()
    assert seen(page) == [EVIL]
    page.locator("#swap").click()
    assert seen(page) == ["A"]
    page.keyboard.press("Space")  # presses the button, once
    assert seen(page) == [EVIL]
    page.locator("[name=search]").fill("red")
    page.locator("[name=search]").press("Space")  # is text there
    assert seen(page) == [EVIL] and page.locator("[name=search]").input_value() == "red "


@needs_browser
def test_the_difference_of_equal_images_is_black(browser: Any, tmp_path: Path, models: list[Shown]) -> None:
    names = [Shown("A", "", models[0].images), Shown("same", "", models[0].images), Shown("B", "", models[1].images)]
    write_comparison(tmp_path / "page.html", "title", PROMPTS, names)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("[name=sort]").is_hidden()  # there is no score
    view(page, "difference")

    def brightest() -> int:
        path = tmp_path / "shot.png"
        box = page.locator("article .b img").first.bounding_box()
        inner = {"x": box["x"] + 10, "y": box["y"] + 10, "width": box["width"] - 20, "height": box["height"] - 20}
        page.screenshot(path=str(path), clip=inner)
        return int(np.asarray(Image.open(path).convert("RGB")).max())

    assert brightest() == 0
    page.locator("[name=b]").select_option("2")
    assert brightest() > 100
    page.close()


@needs_browser
def test_blind_votes_hide_the_names_and_can_be_saved(page: Any) -> None:
    page.locator("[name=sort]").select_option("gain")
    view(page, "flip")
    page.locator("#blind").click()
    assert order(page) == [1, 2, 3, 4] and page.locator("[name=sort]").is_disabled()
    assert page.locator(":is(.name, .scores):visible").count() == 0
    assert set(page.locator("img:visible").evaluate_all("all => all.map(i => i.alt)")) == {
        f"Image {i} of this row" for i in (1, 2, 3)
    }
    buttons = [article.locator("figure .vote") for article in page.locator("article").all()]
    orders = {tuple(each.evaluate_all("all => all.map(button => button.value)")) for each in buttons}
    assert len(orders) > 1 and all(sorted(each) == ["0", "1", "2"] for each in orders)
    for row, vote in ((0, "1"), (1, "0"), (2, "-1"), (3, "1"), (1, "0")):  # that of the second row is withdrawn
        page.locator("article").nth(row).locator(f".vote[value='{vote}']").click()
    assert "3 rows have a vote" in page.locator("#state").inner_text()
    page.reload()
    with page.expect_download() as download:
        page.locator("#save").click()
    votes = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert votes["models"] == list(HPS)
    assert votes["votes"][:2] == [
        {"row": 1, "prompt": PROMPTS[0], "vote": "B"},
        {"row": 3, "prompt": EVIL, "vote": None},
    ]
    page.locator("#blind").click()
    assert page.locator("article").first.locator(".vote[value='1']").get_attribute("aria-pressed") == "true"
    page.locator("#blind").click()
    assert seen(page) == list(HPS)
    assert f"A 0, B 2, {EVIL} 0, no difference 1." in page.locator("#state").inner_text()


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_without_script_and_in_print_all_is_side_by_side(browser: Any, file: Path, width: int) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("img:visible").count() == 12
    assert page.locator("form:visible, button:visible, input:visible").count() == 0
    tops = [image.bounding_box()["y"] for image in page.locator("article").first.locator("img").all()]
    assert max(tops) == min(tops)
    context.close()

    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    view(page, "flip")
    assert page.locator("img:visible").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(media="print")
    assert page.locator("img:visible").count() == 12
    assert page.locator("form:visible, button:visible, input:visible").count() == 0
    page.close()


@needs_browser
def test_a_page_of_100_rows_and_one_of_a_single_model(browser: Any, tmp_path: Path) -> None:
    files = drawn(tmp_path, 3, 120)
    values = torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    many = [Shown("ABC"[i], "", files[i], {"hps": values[i]}) for i in range(3)]
    prompts = [f"prompt {row}" for row in range(120)]
    context = browser.new_context()
    page, said = context.new_page(), watch(context)

    path = tmp_path / "page.html"
    write_comparison(path, "title", prompts, many)
    assert path.stat().st_size < 8e6  # noise of 64 px without loss is 17 kB
    page.goto(path.as_uri())
    assert page.locator(".lead").inner_text().startswith("100 of 120 prompts are shown: the 33 with")
    assert page.locator("img").count() == 300
    page.locator("[name=sort]").select_option("gain")
    gains = (values[1] - values[0]).argsort(descending=True)
    assert order(page)[:33] == (gains[:33] + 1).tolist()  # numbers are those of all rows
    assert order(page)[-33:] == (gains[-33:] + 1).tolist()

    write_comparison(
        path, "title", prompts[:1], [Shown("A", "", Files(tmp_path, files[0].paths[:1]), {"hps": values[0][:1]})]
    )
    page.goto(path.as_uri())
    assert page.locator(".lead").inner_text() == "1 prompt, one row each."
    assert page.locator("select:visible, button:visible, [type=radio]:visible").count() == 0
    assert page.locator("[name=search]").is_visible() and page.locator(".delta").inner_text() == ""
    context.close()
    assert said == []
