//! End-to-end tests of the `firn` command on real programs.
