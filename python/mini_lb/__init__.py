"""The router mini-lb for SGLang prefill-decode disaggregation: a program, with nothing to import."""
