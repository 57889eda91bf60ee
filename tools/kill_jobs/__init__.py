"""Kills the service again and again while it trains, and looks whether anything acknowledged is lost."""
