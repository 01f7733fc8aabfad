"""Reports in a real browser: what is shown, pressed, read out and refused."""

import functools
import json
import shutil
import time

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tda.report import losses, page
from tda.report.page import (
  Document,
  Figure,
  Page,
  Ranking,
  Section,
  Table,
)

EVIL = "</script><script>hit()</script><img src=x onerror=hit()>'\"&{{7*7}}"
# Text and background of an element as they are blended, [2, 3].
BLENDED = """
const pen = new OffscreenCanvas(1, 1).getContext("2d");
const fill = (colour) => { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); };
const read = () => [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
const above = [];
for (let x = arguments[0]; x; x = x.parentElement) above.unshift(x);
above.forEach((x) => fill(getComputedStyle(x).backgroundColor));
const back = read();
fill(getComputedStyle(arguments[0]).color);
return [read(), back];
"""
NAMED = {"DisclosureTriangle", "button", "image", "link", "searchbox", "table"}
"""Roles of what a reader is told by name."""


def ranking(name, count=4, size=6):
  rng = np.random.default_rng(len(name))
  scores = np.sort(rng.standard_normal((count, size)).sum(1))[::-1]
  documents = [
    Document(
      i + 1,
      f"{name} no{i}",
      float(score),
      tokens=[(f" w{j}", float(x)) for j, x in enumerate(each)],
    )
    for i, (score, each) in enumerate(
      zip(scores, rng.standard_normal((count, size)), strict=True)
    )
  ]
  half = count // 2
  return Ranking(name, " yes", documents[:half], documents[half:], [0.2, 0.8])


def written(folder, *parts, title="A report"):
  path = folder / "report.html"
  page.write(path, Page(title, "lead", [Section("All of it", parts)]))
  return path


@pytest.fixture(scope="module")
def browser():
  names = ("chromium", "chromium-browser", "google-chrome")
  binary = next(filter(None, map(shutil.which, names)), None)
  driver = shutil.which("chromedriver")
  if not (binary and driver):
    pytest.skip("no Chromium and chromedriver on the PATH")
  options = webdriver.ChromeOptions()
  options.binary_location = binary
  for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
    options.add_argument(f"--{flag}")
  options.set_capability(
    "goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"}
  )
  with webdriver.Chrome(options=options, service=Service(driver)) as found:
    yield found


@pytest.fixture
def show(browser):
  """Opens a file in light or dark colours; the browser."""

  def opened(path, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd(
      "Emulation.setEmulatedMedia", {"features": features}
    )
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return browser

  return opened


def requests(browser):
  events = [
    json.loads(entry["message"])["message"]
    for entry in browser.get_log("performance")
  ]
  sent = [x for x in events if x["method"] == "Network.requestWillBeSent"]
  return [x["params"]["request"]["url"].partition(":")[0] for x in sent]


def all_of(browser, selector):
  return browser.find_elements(By.CSS_SELECTOR, selector)


def one(browser, selector):
  return browser.find_element(By.CSS_SELECTOR, selector)


def contrast(browser, element):
  """WCAG 2's ratio of the luminances of text and background."""
  values = np.array(browser.execute_script(BLENDED, element)) / 255
  linear = np.where(
    values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
  )
  low, high = np.sort(linear @ [0.2126, 0.7152, 0.0722])
  return (high + 0.05) / (low + 0.05)


def test_a_page_asks_for_nothing_and_complains_of_nothing(tmp_path, show):
  png = tmp_path / "a.png"
  losses.curve(png, [2.0, 1.0], 1.5)
  table = Table(["method", "LDS"], [["EK-FAC", "0.5 [ 0.4, 0.6]"]], "Scores")
  parts = (Figure(png, "a falling line"), table, ranking("q"))
  browser = show(written(tmp_path, *parts))
  one(browser, "summary").click()
  assert browser.get_log("browser") == []
  asked = requests(browser)
  assert asked.count("file") == 1 and set(asked) <= {"file", "data"}
  image = one(browser, "img")
  assert image.get_property("naturalWidth") > 0
  assert image.get_attribute("alt") == "a falling line"
  header = [x.get_attribute("scope") for x in all_of(browser, "th")]
  assert header == ["col", "col", "row"]
  assert one(browser, "td").value_of_css_property("text-align") == "right"


def test_what_is_written_in_documents_is_text(tmp_path, show):
  tokens = [(EVIL, 1.0), ("\r\n\0", -0.5), ("𝄞", 0.25), (EVIL, -1.0)]
  document = Document(1, EVIL, 0.5, tokens=tokens)
  table = Table([EVIL], [[EVIL]], EVIL)
  parts = (EVIL, table, Ranking(EVIL, EVIL, [document]))
  browser = show(written(tmp_path, *parts, title=EVIL))
  one(browser, "summary").click()
  assert browser.get_log("browser") == []
  assert not all_of(browser, "img") and len(all_of(browser, "script")) == 1
  assert browser.title == EVIL and "49" not in browser.page_source
  shown = [x.get_property("textContent") for x in all_of(browser, ".text span")]
  assert shown == [EVIL, "\n", "𝄞", EVIL]
  (source,) = all_of(browser, "script")
  browser.execute_script(
    "const x = document.createElement('script');"
    "x.textContent = 'document.title = 1'; arguments[0].after(x)",
    source,
  )
  assert browser.title == EVIL  # no script runs but the page's own


def test_tokens_are_drawn_when_a_document_is_opened(tmp_path, show):
  many = [ranking(f"q{i}", 100, 200) for i in range(10)]
  browser = show(written(tmp_path, *many))
  assert len(all_of(browser, "details")) == 1000
  assert not all_of(browser, ".text span")
  count = browser.execute_script("return document.all.length")
  assert count < 30_000
  one(browser, "summary").click()
  tokens = all_of(browser, ".text .token")
  assert len(tokens) == 200
  first = many[0].highest[0]
  pairs = [(x.text.strip(), x.get_attribute("class")) for x in tokens[:3]]
  for (text, kind), (token, score) in zip(pairs, first.tokens, strict=False):
    assert text == token.strip()
    assert kind.split()[1] == ("positive" if score > 0 else "negative")
  strongest = max(first.tokens, key=lambda token: token[1])
  shown = one(browser, ".strongest").text
  assert strongest[0].strip() in shown and f"{strongest[1]:+#.3g}" in shown
  line = lambda kind: one(
    browser, f".text .strong.{kind}"
  ).value_of_css_property("text-decoration-style")
  assert (line("positive"), line("negative")) == ("solid", "dotted")


def test_the_filter_counts_aloud_and_keys_pass_over_what_it_hides(
  tmp_path, show
):
  browser = show(written(tmp_path, ranking("red"), ranking("blue")))
  status = one(browser, "output")
  assert status.text == "8 of 8 documents"
  assert status.get_attribute("aria-live") == "polite"
  filter_box = one(browser, "#filter")
  filter_box.send_keys("RED no2")
  assert status.text == "1 of 8 documents"
  filter_box.send_keys(Keys.BACKSPACE * 7)
  assert status.text == "8 of 8 documents"
  filter_box.send_keys("w0")
  at = lambda: one(browser.switch_to.active_element, ".name").text
  browser.execute_script("document.querySelector('summary').focus()")
  assert at() == "red no0"
  for key, name in (
    (Keys.ARROW_UP, "red no0"),
    (Keys.ARROW_DOWN, "red no1"),
    (Keys.ARROW_DOWN, "red no2"),
    (Keys.ARROW_RIGHT, "blue no0"),
    (Keys.ARROW_UP, "red no3"),
    (Keys.ARROW_RIGHT, "blue no0"),
    (Keys.ARROW_LEFT, "red no0"),
  ):
    browser.switch_to.active_element.send_keys(key)
    assert at() == name
  browser.switch_to.active_element.send_keys(Keys.ENTER)
  assert len(all_of(browser, "details[open]")) == 1
  filter_box.clear()
  filter_box.send_keys("blue")
  browser.execute_script(
    "document.querySelectorAll('.ranking')[1].querySelector('summary').focus()"
  )
  browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
  assert at() == "blue no0"  # there is nothing left of it


def test_tab_goes_to_the_skip_link_first(tmp_path, show):
  browser = show(written(tmp_path, ranking("q")))
  one(browser, "body").send_keys(Keys.TAB)
  skip = browser.switch_to.active_element
  assert skip.text == "Skip to the results" and skip.rect["y"] >= 0
  skip.send_keys(Keys.ENTER)
  assert browser.switch_to.active_element.get_attribute("id") == "main"
  browser.switch_to.active_element.send_keys(Keys.TAB)
  focused = browser.switch_to.active_element
  assert focused.get_attribute("id") == "filter"
  assert focused.value_of_css_property("outline-style") == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(tmp_path, show, scheme):
  browser = show(written(tmp_path, "said", ranking("q")), scheme)
  one(browser, "summary").click()
  tags = "h1, .lead, a, button, label, output, kbd, .said, mark, figcaption"
  rest = ".rank, .score, .name, .token, .strongest, h4, .legend"
  elements = all_of(browser, f"{tags}, {rest}")
  measure = functools.partial(contrast, browser)
  assert min(map(measure, elements)) >= 4.5
  # The strongest tokens' colours stand for signs, and differ.
  back = lambda kind: browser.execute_script(
    BLENDED, one(browser, f".legend .{kind}")
  )[1]
  positive, negative = np.array(back("positive")), np.array(back("negative"))
  assert positive[2] > positive[0] and negative[0] > negative[2]  # blue, orange
  paper = lambda: browser.execute_script(BLENDED, one(browser, "body"))[1][0]
  assert (paper() > 200) == (scheme == "light")
  one(browser, "#theme").click()
  assert (paper() > 200) == (scheme == "dark")
  assert min(map(measure, elements)) >= 4.5


def test_everything_that_is_used_has_a_name(tmp_path, show):
  table = Table(["a"], [["b"]], "Numbers")
  browser = show(written(tmp_path, table, ranking("q"), ranking("r")))
  nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
  kept = [x for x in nodes if not x.get("ignored")]
  named = lambda x: (x["role"]["value"], x.get("name", {}).get("value", ""))
  found = [named(x) for x in kept if x["role"]["value"] in NAMED]
  assert {role for role, _ in found} == NAMED
  assert all(name.strip() for _, name in found), found
  roles = [x["role"]["value"] for x in kept]
  for landmark in ("banner", "main", "navigation", "search", "article"):
    assert landmark in roles
  levels = [int(x.tag_name[1]) for x in all_of(browser, "h1, h2, h3, h4")]
  assert levels[0] == 1 and max(np.diff(levels)) == 1
  assert one(browser, "html").get_attribute("lang") == "en"


def test_a_narrow_window_has_nothing_beside_it(tmp_path, show):
  browser = show(written(tmp_path, ranking("q" * 90)))
  metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1}
  browser.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride", {**metrics, "mobile": False}
  )
  one(browser, "summary").click()
  root = "document.documentElement"
  beside = f"return {root}.scrollWidth - {root}.clientWidth"
  assert browser.execute_script(beside) == 0
  browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_is_readable_without_its_script(tmp_path, show):
  path = written(tmp_path, ranking("q"))
  browser = show(path)
  off = "Emulation.setScriptExecutionDisabled"
  browser.execute_cdp_cmd(off, {"value": True})
  browser.get(path.as_uri())
  assert "hidden" in browser.page_source
  assert not one(browser, "#filter").is_displayed()
  assert not one(browser, "#theme").is_displayed()
  one(browser, "summary").click()
  time.sleep(0.1)
  assert one(browser, ".text").text.strip().startswith("w0 w1 w2")
  browser.execute_cdp_cmd(off, {"value": False})


def test_wrong_pages_are_refused(tmp_path):
  with pytest.raises(ValueError, match="'empty' has no sections"):
    page.write(tmp_path / "a.html", Page("empty", "", []))
  bad = Document(1, "bad", 0.0, tokens=[("a", float("nan"))])
  with pytest.raises(ValueError, match="'bad' has a token whose score"):
    written(tmp_path, Ranking("q", "a", [bad]))
  assert not list(tmp_path.iterdir())


def test_settings_are_flat():
  table = page.settings({"a": {"b": 1, "c": {}}, "d": (1, 2), "e": "x"})
  assert table.rows == [
    ("a.b", "1"),
    ("a.c", "{}"),
    ("d", "[1, 2]"),
    ("e", "x"),
  ]
