//! The cost of limits: picks, learning, affinity, waiting, memory, and how evenly keys are picked.
//!
//! ```text
//! cargo bench --bench limits
//! cargo bench --bench limits -- pick memory    # parts whose names begin so
//! ```
//!
//! Picks are those of [`KeyPool::lease`](tower_key_rotation::KeyPool::lease): a pick is timed apart from its end, which is
//! the drop of the lease, or an answer to learn from.

#[path = "../support/mod.rs"]
mod support;

mod affinity;
mod fairness;
mod learning;
mod memory;
mod pick;
mod pools;
mod waiting;

use std::env;

fn main() {
    let parts: [(&str, fn()); 8] = [
        ("pick", pick::paced),
        ("saturated", pick::saturated),
        ("scopes", pick::in_scopes),
        ("learning", learning::run),
        ("affinity", affinity::run),
        ("memory", memory::run),
        ("waiting", waiting::run),
        ("fairness", fairness::run),
    ];
    let chosen: Vec<_> = env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|begins| name.starts_with(&**begins));
    parts.into_iter().filter(|(name, _)| is_chosen(name)).for_each(|(_, run)| run());
}
