"""Show results to people: numbers, tables, figures and pages."""

MISSING_EXTRA = (
    "The report draws with matplotlib and jinja2, which are not installed. "
    "Run `pip install 'hf-pss[report]'`."
)
