//! Descriptors and paths: one module per kind, dump and restore side by side.
