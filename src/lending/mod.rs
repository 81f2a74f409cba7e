//! Ownership and lending: how several processes share the limits of their keys through a store.
//!
//! Each limit of a scope has one owner among the processes that use the scope. Only the owner learns the limit and paces
//! it. Once a second, each process publishes one small [`Message`]: how much it needs, how much it has, and which tokens
//! it lends to others. A token is the right to send one request with a key that another process owns.
//!
//! Nothing here does I/O, reads a clock, or knows a pool.

mod matching;
mod message;
mod names;
mod outbox;
mod peers;
mod stock;

pub(crate) use self::{
    matching::{Row, left_to_spare, shares},
    message::{Back, Item, Loan, Message, Need, Part, Release, Report, Spent, Used},
    names::{name_of, owner},
    outbox::Outbox,
    peers::{Peers, Says},
    stock::{Origin, Stock, Token},
};
