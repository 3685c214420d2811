"""Shows things: tables, plots and pages."""
