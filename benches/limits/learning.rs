//! The time to learn from a response: beyond the end of a request that had none.

use http::{HeaderMap, StatusCode};
use tower_key_rotation::{Traits, classify::ResponseHead};

use crate::{
    pools::{self, ends, lease},
    support::compare::{Bar, Comparison},
};

const DROPPED: &str = "no response";

type Headers = fn() -> HeaderMap;

const RESPONSES: [(&str, Headers); 4] = [
    ("a response without limits", HeaderMap::new),
    ("OpenAI's headers of one budget", pools::of_requests),
    ("OpenAI's headers, with tokens", pools::open_ai),
    ("Anthropic's headers, with 5 dates", pools::anthropic),
];

pub(crate) fn run() {
    let comparison = Comparison::new("the end of a paced request, 100 keys").timed(DROPPED, || {
        let (pool, traits) = (pools::paced(100, &[Traits::new()]), Traits::new());
        ends(move || lease(&pool, &traits), drop)
    });
    let comparison = RESPONSES.into_iter().fold(comparison, |comparison, (name, headers)| {
        comparison.timed(name, move || {
            let (pool, traits, headers) = (pools::paced(100, &[Traits::new()]), Traits::new(), headers());
            pools::learn(&pool, 100, &traits, &headers);
            ends(
                move || lease(&pool, &traits),
                move |lease| _ = lease.answered(&ResponseHead::new(StatusCode::OK, &headers)),
            )
        })
    });
    allocations();
    let Some(outcome) = comparison.run() else { return };
    outcome.print(DROPPED);
    for (name, _) in RESPONSES {
        Bar::AtMost(150.0).print(&format!("learning from {name}"), outcome.beyond(name, DROPPED), " ns");
    }
}

fn allocations() {
    for (name, headers) in RESPONSES {
        let (pool, traits, headers) = (pools::paced(1, &[Traits::new()]), Traits::new(), headers());
        // The first response says that tokens are limited, the second is one of a request that reserves some.
        pools::learn(&pool, 2, &traits, &headers);
        let lease = lease(&pool, &traits);
        let counted = allocation_counter::measure(|| {
            let _ = lease.answered(&ResponseHead::new(StatusCode::OK, &headers));
        });
        assert_eq!(counted.count_total, 0, "learning from {name} allocates");
    }
}
