//! The .proto definitions of images and RPC and their prost types, nothing else.
