"""Stock SGLang and ours on the same workloads, through their HTTP interface."""
