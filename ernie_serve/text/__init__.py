"""Between strings and token ids. No torch, no HTTP."""
