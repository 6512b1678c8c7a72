//! Open files of a shell, dumped, and given to a child that only has them.

mod ghosts;
mod kinds;
mod obstacles;
mod stage;
