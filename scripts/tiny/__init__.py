"""What makes `ernie-tiny`: its data, its tokenizer, its network while it is trained, and its examination.

Knows nothing about the server; the two meet in the files under `ernie_serve/bundled/ernie-tiny`.
"""
