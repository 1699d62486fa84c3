"""A trained model as a Hugging Face folder.

In: trained weights, a tokenizer and a decoding contract. Out: safetensors, tokenizer, `reranker.json`, a model card,
and a check of what the serving client will make of the folder.
"""
