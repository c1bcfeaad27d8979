"""What a test asks a browser that was driven to a page."""

import json
from typing import Any


def requests_of(browser: Any) -> list[str]:
    """Addresses that the browser asked for since the last call; none but the page itself, it is hoped."""
    requests = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in requests if not url.startswith(("data:", "blob:"))]
