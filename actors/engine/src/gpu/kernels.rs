//! What runs on a device, one file for each kind of work.

mod attention;
mod choice;
mod products;
mod rows;
mod unpack;

pub(crate) use attention::*;
pub(crate) use choice::*;
pub(crate) use products::*;
pub(crate) use rows::*;
#[cfg(test)]
pub(crate) use unpack::unpack_rows;
