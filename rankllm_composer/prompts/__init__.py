"""A teacher-ranked list as text and tokens, and back.

In: a `Record` (query, passages, teacher's permutation) or a prompt's text. Out: the rank_llm client's prompt, token ids
with the positions that are supervised, and the decoding contract that says how a trained model is prompted and read.
"""
