"""The client's side of one worker: its session, what is sent, awaited, fetched and found."""
