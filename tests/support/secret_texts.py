"""Examples of credentials."""

from __future__ import annotations

# Split, so that secret scanners do not report the examples.
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKE1",
    "hf_" + "abcdefghijklmnopqrstuvwxyz0123",
    "ghp_" + "0123456789abcdefghij0123456789abcdef",
    "github_pat_" + "11ABCDEFG0123456789_abcdefghijkl",
    "sk-" + "proj-0123456789abcdefghij",
    "xoxb-" + "123456789012-abcdefghij",
    "AIza" + "SyA0123456789abcdefghijklmnopqrstuv",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
]
