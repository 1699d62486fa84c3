"""Train listwise LLM rerankers with MosaicML Composer: teacher-ranked lists in, a served reranker out."""

from __future__ import annotations

__version__ = "0.1.0"
