"""How actors live: mailboxes, life cycle, threads, processes and files."""
