//! All that differs between operating systems: local sockets, file permissions and locks.
//! Linux and macOS are supported; another system needs a second version of this module only.

mod child_group;
mod files;
mod graphics;
mod local_socket;
mod machine;
mod signals;

pub use child_group::ChildGroup;
pub use files::{
    FileLock, Fingerprint, LockError, create_private_dir, is_writable_by_others, open_not_through_links, read_optional,
    write_atomically, write_private,
};
pub use graphics::graphics_cards;
pub use local_socket::{LocalListener, LocalStream, connect, remove_socket};
pub use machine::{
    available_disk_space, disk_size, hardware, memory_bandwidth, memory_of, raise_open_files_limit, resident_memory_of,
};
pub use signals::EndSignals;
