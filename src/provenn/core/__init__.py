"""Shared mechanisms, named for what they do. No paper lives here."""
