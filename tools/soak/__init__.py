"""A service under everything at once, with kills: `python -m tools.soak`. Nothing may be lost, wrong or leaked."""
