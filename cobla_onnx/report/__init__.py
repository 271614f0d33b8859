"""Reports: what was decided and measured, for programs and for people."""
