"""The packed forward pass and what it is trained on.

In: a Hugging Face causal LM and packed microbatches. Out: a `ComposerModel` with the objectives (`generation`,
`ranking`, `combined`), the ranking losses, NEFTune noise, and the FLOPs of a step.
"""
