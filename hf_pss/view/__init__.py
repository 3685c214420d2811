"""Show results to people: numbers, tables, figures and pages."""
