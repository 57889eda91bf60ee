"""`make demo`: three tenants, three adapters, one base, shown through the public API alone."""
