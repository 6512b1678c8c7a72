//! Address spaces: mappings, pages, shared objects, dump and restore side by side.
