"""``saetrain explore RUN``: the page of a run with a prompt box, which a server on this machine answers."""
