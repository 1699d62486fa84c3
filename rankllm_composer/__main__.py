"""`python -m rankllm_composer` is the same as `rankllm-composer`."""

from rankllm_composer.cli import main

main()
