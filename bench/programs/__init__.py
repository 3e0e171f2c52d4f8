"""SGLang frontend programs, run against stock SGLang and ours."""
