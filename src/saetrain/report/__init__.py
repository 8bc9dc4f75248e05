"""``saetrain report``: one HTML page per run, which needs neither a network nor a server."""
