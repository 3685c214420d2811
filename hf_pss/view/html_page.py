"""The report of a demo run: `table` for the terminal, `html` for the browser (extra `report`)."""

from __future__ import annotations

MISSING_EXTRA = (
    "The report draws with matplotlib and jinja2, which are not installed. "
    "Run `pip install 'hf-pss[report]'`."
)
