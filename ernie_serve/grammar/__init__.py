"""From what an answer must look like to which token may come next."""
