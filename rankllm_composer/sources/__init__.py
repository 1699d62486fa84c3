"""Training and retrieval data, read as records.

In: conversations (JSON, JSONL, Hugging Face datasets) or retrieval files (a TREC run with judgments or a teacher's run,
queries, documents). Out: validated `Record`s, one at a time, or an error that names file, line and id.
"""
