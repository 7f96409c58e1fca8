"""A report opened in a real browser: Debian's chromium, driven by Playwright."""

from pathlib import Path
from typing import Any


class Opened:
    """A page, with everything it complained about or asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda r: self.complaints.append(r.url) if r.url.startswith("http") else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]", state="attached")

    def seen(self, part: str) -> None:
        self.page.locator(part).scroll_into_view_if_needed()
        self.page.wait_for_selector(f"{part} .main-svg")
