//! Thin typed wrappers for kernel interfaces, one module per interface.
