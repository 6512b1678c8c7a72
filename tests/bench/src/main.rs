//! Benchmarks against peers and physical floors.
fn main() {}
