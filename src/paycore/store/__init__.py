"""Where facts are kept. Everything above works through ``store.protocol`` and sees rows, never SQL."""
