"""What a run of each stage needs, from its settings and the configs of folders alone: what `plan` is told by stages."""
