//! What a request holds of a limit until its response's body ends: tokens, and a place in flight.

mod support;

use std::{
    io,
    num::NonZeroU32,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use reqwest::ResponseBuilderExt;
use support::{MINUTE, SECOND};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    Failover, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, Quota, Reservation, Traits,
    classify::{ResponseHead, Verdict},
    clock::ManualClock,
};

/// A body of so many bytes, one a frame. The last frame may be an error, or a panic.
#[derive(Clone)]
struct Frames {
    left: usize,
    last: Last,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Last {
    Byte,
    Error,
    Panic,
}

impl Frames {
    fn of(left: usize) -> Self {
        Self { left, last: Last::Byte }
    }
}

impl Body for Frames {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.left = match self.left.checked_sub(1) {
            None => return Poll::Ready(None),
            Some(0) if self.last == Last::Error => {
                return Poll::Ready(Some(Err(io::Error::other("cut off"))));
            }
            Some(0) if self.last == Last::Panic => std::panic::resume_unwind(Box::new("as asked")),
            Some(left) => left,
        };
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b".")))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

/// A request, and the status and the body of its answer.
fn request(traits: Traits, status: u16, body: Frames) -> Request<String> {
    let request = Request::post("https://api.example.com/v1").extension(traits);
    request.extension(StatusCode::from_u16(status).unwrap()).extension(body).body(String::new()).unwrap()
}

async fn answer(request: Request<String>) -> io::Result<Response<Frames>> {
    let extensions = request.extensions();
    let status = *extensions.get::<StatusCode>().unwrap();
    Ok(Response::builder().status(status).body(extensions.get::<Frames>().unwrap().clone()).unwrap())
}

type AnyBody = http_body_util::combinators::UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// The ways of sending in which the layer sees the body.
#[derive(Clone, Copy, Debug)]
enum Way {
    Failover,
    ReadErrors,
    Reqwest,
    ReqwestFailover,
    /// After a wait.
    Attempts,
}

const WAYS: [Way; 5] = [Way::Failover, Way::ReadErrors, Way::Reqwest, Way::ReqwestFailover, Way::Attempts];

async fn send(
    pool: &KeyPool,
    way: Way,
    traits: Traits,
    status: u16,
    body: Frames,
) -> Option<Response<AnyBody>> {
    let layer = KeyRotationLayer::new(pool);
    let request = request(traits.clone(), status, body.clone());
    match way {
        Way::Failover => {
            let client = layer.failover(Failover::attempts(2)).layer(service_fn(answer));
            Some(client.oneshot(request).await.ok()?.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
        Way::ReadErrors => {
            let client = layer.read_error_bodies(100).layer(service_fn(answer));
            Some(client.oneshot(request).await.ok()?.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
        Way::Attempts => {
            let layer = layer.failover(Failover::attempts(2)).wait_up_to(4_000 * MINUTE);
            // Nothing is left, so the request waits.
            let all: Vec<_> = std::iter::from_fn(|| pool.lease(&traits).ok()).take(1_000).collect();
            let sent = layer.layer(service_fn(answer)).oneshot(request);
            let sent = tokio::spawn(tokio::time::timeout(SECOND, sent));
            tokio::time::sleep(SECOND / 10).await;
            assert!(!sent.is_finished());
            drop(all);
            Some(sent.await.unwrap().ok()?.ok()?.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
        Way::Reqwest | Way::ReqwestFailover => {
            let client = service_fn(move |_: reqwest::Request| {
                let response = Response::builder().status(status).body(reqwest::Body::wrap(body.clone()));
                async move { io::Result::Ok(reqwest::Response::from(response.unwrap())) }
            });
            let request =
                reqwest::Request::new(reqwest::Method::GET, "https://api.example.com/v1".parse().unwrap());
            let describe = move |_: &reqwest::Request| traits.clone();
            let layer = layer.describe(describe);
            let response = match way {
                Way::Reqwest => layer.layer(client).oneshot(request).await.ok()?,
                _ => layer.failover(Failover::attempts(2)).layer(client).oneshot(request).await.ok()?,
            };
            let response: Response<reqwest::Body> = response.into();
            Some(response.map(|body| body.map_err(Into::into).boxed_unsync()))
        }
    }
}

fn keys(count: usize) -> KeyPoolBuilder {
    KeyPool::builder().keys((0..count).map(|key| (format!("k{key}"), format!("sk-{key}"))))
}

/// A key with 1,000 tokens for the whole test.
fn thousand_tokens() -> KeyPool {
    let quota = Quota::per_day(1_000).burst(1_000).tokens();
    keys(1).quota(quota).clock(ManualClock::new()).build().unwrap()
}

/// How many tokens the key still has.
fn left(pool: &KeyPool) -> u64 {
    let has = |tokens: u64| pool.lease(&Traits::new().tokens(tokens)).is_ok();
    let (mut low, mut high) = (0_u64, 1_000);
    while low < high {
        let middle: u64 = (low + high).div_ceil(2);
        if has(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

fn tokens(tokens: u64) -> Traits {
    Traits::new().tokens(tokens)
}

#[test]
fn leases_count_what_was_used() {
    let pool = thousand_tokens();
    let answered = |estimate| {
        let lease = pool.lease(&tokens(estimate)).unwrap();
        lease.answered_with(Verdict::Nothing);
        lease
    };
    drop(answered(100));
    assert_eq!(left(&pool), 900);
    answered(100).used(30);
    assert_eq!(left(&pool), 870);
    // More than the estimate counts at once, less only at the end: there may be more to come.
    let lease = answered(100);
    lease.used(40);
    assert_eq!(left(&pool), 770);
    lease.used(80);
    assert_eq!(left(&pool), 750);
    drop(lease);
    assert_eq!(left(&pool), 750);
    // Without an answer, nothing was used, unless the caller says so.
    drop(pool.lease(&tokens(100)).unwrap());
    assert_eq!(left(&pool), 750);
    pool.lease(&tokens(100)).unwrap().used(50);
    assert_eq!(left(&pool), 700);
}

/// Say, the difference of two numbers of tokens, of which a service reports the second one larger.
#[test]
fn impossible_usage_closes_no_key() {
    let too_many = [1_000_u64.wrapping_sub(2_000), 1_000_u32.wrapping_sub(2_000).into()];
    for too_many in too_many {
        let pool = thousand_tokens();
        for is_answered in [true, false] {
            let lease = pool.lease(&tokens(100)).unwrap();
            if is_answered {
                lease.answered_with(Verdict::Nothing);
            }
            lease.used(too_many);
            lease.used(too_many);
        }
        // The answered request counts for what it reserved, the other one for nothing.
        assert_eq!(left(&pool), 900, "{too_many}");
        // Nor does it count for the average usage.
        assert!(pool.lease(&Traits::new()).is_ok(), "{too_many}");
        // What is said beside it counts.
        let lease = pool.lease(&tokens(100)).unwrap();
        lease.used(200);
        lease.used(too_many);
        drop(lease);
        assert_eq!(left(&pool), 700, "{too_many}");
    }
}

/// In a gateway, the caller names the most tokens that an answer may have.
#[test]
fn one_huge_estimate_closes_no_key() {
    let (clock, quota) = (ManualClock::new(), Quota::per_day(1_000).window().tokens());
    let pool = keys(1).quota(quota).clock(clock.clone()).build().unwrap();
    for _ in 0..3 {
        pool.lease(&tokens(1)).unwrap().answered_with(Verdict::Nothing);
        clock.advance(24 * 60 * MINUTE);
    }
    let lease = pool.lease(&tokens(u64::MAX)).unwrap();
    lease.answered(&ResponseHead::new(StatusCode::BAD_REQUEST, &HeaderMap::new()));
    drop(lease);
    for _ in 0..100 {
        pool.lease(&tokens(1)).unwrap().answered_with(Verdict::Nothing);
    }
}

#[tokio::test]
async fn refused_requests_give_their_tokens_back_once() {
    let pool =
        keys(1).quota(Quota::per_day(1_000).window().tokens()).clock(ManualClock::new()).build().unwrap();
    let serve = |estimate, used, verdict| {
        let lease = pool.lease(&tokens(estimate)).unwrap();
        lease.answered_with(verdict);
        lease.used(used);
    };
    serve(200, 200, Verdict::Nothing);
    serve(150, 0, Verdict::RateLimited { wait: None });
    pool.reset("k0").await.unwrap();
    assert_eq!(left(&pool), 800);
    // A service may count a refused request all the same, as the caller says.
    serve(150, 100, Verdict::RateLimited { wait: None });
    pool.reset("k0").await.unwrap();
    assert_eq!(left(&pool), 700);
}

#[tokio::test(start_paused = true)]
async fn whole_bodies_count_for_what_was_reserved_or_said() {
    for way in WAYS {
        let pool = thousand_tokens();
        for (body, said, now_left) in
            [(3, None, 900), (0, None, 800), (3, Some(250), 550), (3, Some(20), 530)]
        {
            let response = send(&pool, way, tokens(100), 200, Frames::of(body)).await.unwrap();
            let reservation = response.extensions().get::<Reservation>().unwrap().clone();
            let whole = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(whole.len(), body, "{way:?}");
            // Said after the end of the body, when it is known.
            said.into_iter().for_each(|tokens| reservation.used(tokens));
            assert_eq!(left(&pool), now_left, "{way:?}, {body} bytes, {said:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f41_a_half_read_body_gives_half_back() {
    for way in WAYS {
        let pool = thousand_tokens();
        let mut body = send(&pool, way, tokens(100), 200, Frames::of(3)).await.unwrap().into_body();
        body.frame().await.unwrap().unwrap();
        assert_eq!(left(&pool), 900, "{way:?}");
        drop(body);
        assert_eq!(left(&pool), 950, "{way:?}");
        // Not a byte was read.
        drop(send(&pool, way, tokens(100), 200, Frames::of(3)).await.unwrap());
        assert_eq!(left(&pool), 900, "{way:?}");
        let cut = send(&pool, way, tokens(100), 200, Frames { left: 3, last: Last::Error }).await.unwrap();
        cut.into_body().collect().await.unwrap_err();
        assert_eq!(left(&pool), 850, "{way:?}");
        // It is known what was used.
        let response = send(&pool, way, tokens(100), 200, Frames::of(3)).await.unwrap();
        response.extensions().get::<Reservation>().unwrap().used(70);
        assert_eq!(left(&pool), 750, "{way:?}");
        drop(response);
        assert_eq!(left(&pool), 780, "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn f41_failed_requests_give_all_tokens_back() {
    for way in WAYS {
        let pool = thousand_tokens();
        for status in [400, 500] {
            let response = send(&pool, way, tokens(100), status, Frames::of(3)).await.unwrap();
            assert_eq!(left(&pool), 1_000, "{way:?}, {status}");
            assert!(response.extensions().get::<Reservation>().is_none());
        }
    }
    let pool = thousand_tokens();
    let fails =
        service_fn(async |_: Request<String>| io::Result::<Response<String>>::Err(io::Error::other("cut")));
    let client = KeyRotationLayer::new(&pool).layer(fails);
    client.oneshot(request(tokens(100), 200, Frames::of(0))).await.unwrap_err();
    assert_eq!(left(&pool), 1_000);
}

/// Where the layer does not see the body, the reservation lives in the extensions.
#[tokio::test]
async fn unseen_bodies_count_until_the_reservation_is_dropped() {
    let pool = keys(1).paced().build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(service_fn(answer));
    let send = || client.clone().oneshot(request(Traits::new(), 200, Frames::of(3)));
    // Four at first, and one more for each success.
    let mut responses = Vec::new();
    for _ in 0..20 {
        responses.push(send().await.unwrap());
    }
    let kept: Vec<_> = responses.into_iter().map(|response| response.into_parts().0).collect();
    assert_eq!(free(&pool), 4);
    let reservation = kept[0].extensions.get::<Reservation>().unwrap().clone();
    drop(kept);
    assert_eq!(free(&pool), 23);
    drop(reservation);
    assert_eq!(free(&pool), 24);
}

/// How many requests the pool would send now.
fn free(pool: &KeyPool) -> usize {
    let leases: Vec<_> = std::iter::from_fn(|| pool.lease(&Traits::new()).ok()).take(1_000).collect();
    leases.len()
}

#[tokio::test(start_paused = true)]
async fn f41_bodies_are_in_flight_until_they_end() {
    for way in WAYS {
        let pool = keys(1).paced().build().unwrap();
        let mut bodies = Vec::new();
        for _ in 0..10 {
            bodies.push(send(&pool, way, Traits::new(), 200, Frames::of(2)).await.unwrap().into_body());
        }
        assert_eq!(free(&pool), 4, "{way:?}");
        // The last byte is the end: nobody has to ask for more.
        for _ in 0..2 {
            bodies[0].frame().await.unwrap().unwrap();
        }
        assert_eq!(free(&pool), 5, "{way:?}");
        bodies[1].frame().await.unwrap().unwrap();
        assert_eq!(free(&pool), 5, "{way:?}");
        bodies.truncate(4);
        assert_eq!(free(&pool), 11, "{way:?}");
        drop(bodies);
        assert_eq!(free(&pool), 14, "{way:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn f41_a_keys_cap_counts_bodies_until_they_end() {
    for way in WAYS {
        let mut spec = KeySpec::new(KeyId::new("k0").unwrap(), "sk-0");
        spec.max_in_flight = NonZeroU32::new(2);
        let pool = KeyPool::builder().key_spec(spec).build().unwrap();
        let mut bodies = Vec::new();
        for _ in 0..2 {
            bodies.push(send(&pool, way, Traits::new(), 200, Frames::of(2)).await.unwrap().into_body());
        }
        assert_eq!(free(&pool), 0, "{way:?}");
        bodies[0].frame().await.unwrap().unwrap();
        assert_eq!(free(&pool), 0, "{way:?}");
        bodies[0].frame().await.unwrap().unwrap();
        assert_eq!(free(&pool), 1, "{way:?}");
        drop(bodies);
        assert_eq!(free(&pool), 2, "{way:?}");
        // An error's body counts no longer than its head.
        let error = send(&pool, way, Traits::new(), 500, Frames::of(2)).await.unwrap();
        assert_eq!(free(&pool), 2, "{way:?}");
        drop(error);
    }
}

/// However a body ends, nothing of its request stays behind.
#[tokio::test(start_paused = true)]
async fn f41_half_read_bodies_leave_nothing_in_flight() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let way = random.choice(WAYS).unwrap();
        let pool = keys(1).paced().build().unwrap();
        let mut bodies = Vec::new();
        let mut served = 0;
        for _ in 0..60 {
            let last = random.choice([Last::Byte, Last::Byte, Last::Error, Last::Panic]).unwrap();
            let body = Frames { left: random.usize(0..5), last };
            if let Some(response) = send(&pool, way, Traits::new(), 200, body).await {
                served += 1;
                bodies.push(response.into_body());
            }
            for _ in 0..random.usize(0..4) {
                if bodies.is_empty() {
                    break;
                }
                let mut body = bodies.swap_remove(random.usize(..bodies.len()));
                let frames = random.usize(0..6);
                // A task of its own: a body may panic.
                let read = tokio::spawn(async move {
                    for _ in 0..frames {
                        if body.frame().await.is_none_or(|frame| frame.is_err()) {
                            break;
                        }
                    }
                    body
                });
                if let Ok(body) = read.await
                    && random.bool()
                {
                    bodies.push(body);
                }
            }
        }
        drop(bodies);
        assert_eq!(free(&pool), 4 + served, "{way:?}, seed {seed}");
    }
}

#[tokio::test]
async fn held_reqwest_responses_stay_what_they_were() {
    let url: reqwest::Url = "https://api.example.com/v1?q=1".parse().unwrap();
    let address: std::net::SocketAddr = "192.0.2.1:443".parse().unwrap();
    let client = service_fn({
        let url = url.clone();
        move |_: reqwest::Request| {
            let response = Response::builder().status(201).version(Version::HTTP_2).header("x-a", "b");
            let response = response.extension("an extension").extension(address).url(url.clone());
            let response = response.body(reqwest::Body::wrap(Frames::of(3))).unwrap();
            async move { io::Result::Ok(reqwest::Response::from(response)) }
        }
    });
    let pool = keys(1).paced().build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(client);
    let request = reqwest::Request::new(reqwest::Method::GET, url.clone());
    let response = client.oneshot(request).await.unwrap();
    assert!(response.extensions().get::<Reservation>().is_some());
    assert_eq!((response.url(), response.status().as_u16()), (&url, 201));
    assert_eq!((response.version(), &response.headers()["x-a"]), (Version::HTTP_2, &"b".parse().unwrap()));
    assert_eq!(response.extensions().get(), Some(&"an extension"));
    assert_eq!(response.extensions().get(), Some(&address));
    assert_eq!(response.content_length(), Some(3));
    assert_eq!(response.bytes().await.unwrap(), "...");
}

#[tokio::test]
async fn remote_addresses_and_lengths_outlast_the_hold() {
    let server = support::Server::answering(|| support::answer(200, "hello")).await;
    let pool = keys(1).paced().allow_cleartext_to(["127.0.0.1"]).build().unwrap();
    for failover in [false, true] {
        let layer = KeyRotationLayer::new(&pool);
        let request = support::get_request(&server.url());
        let response = match failover {
            false => layer.layer(support::http()).oneshot(request).await,
            true => layer.failover(Failover::attempts(2)).layer(support::http()).oneshot(request).await,
        };
        let response = response.unwrap();
        assert!(response.extensions().get::<Reservation>().is_some());
        assert_eq!(response.remote_addr(), Some(server.address()));
        assert_eq!((response.content_length(), response.url().as_str()), (Some(5), &*server.url()));
        assert_eq!(response.text().await.unwrap(), "hello");
    }
}

#[tokio::test]
async fn pools_without_limits_hold_nothing() {
    let pool = keys(1).build().unwrap();
    // No request of such a pool waits here.
    for way in &WAYS[..4] {
        let response = send(&pool, *way, Traits::new(), 200, Frames::of(2)).await.unwrap();
        assert!(response.extensions().get::<Reservation>().is_none(), "{way:?}");
    }
}

#[test]
fn requests_without_an_estimate_reserve_what_others_used() {
    let said = |quota: u32| {
        let quota = Quota::per_day(quota).burst(quota).tokens();
        keys(1).quota(quota).clock(ManualClock::new()).build().unwrap()
    };
    // The first guess: 1,000, or a tenth of the limit.
    assert_eq!(free(&said(20_000)), 20);
    assert_eq!(free(&said(2_000)), 10);

    let serve = |pool: &KeyPool, traits: &Traits, used: Option<u64>| {
        let lease = pool.lease(traits).unwrap();
        lease.answered_with(Verdict::Nothing);
        used.into_iter().for_each(|tokens| lease.used(tokens));
    };
    // Others have said what they think that they use,
    let pool = said(20_000);
    serve(&pool, &tokens(200), None);
    assert_eq!(free(&pool), 99);
    // or what they used: that counts more.
    let pool = said(20_000);
    serve(&pool, &tokens(200), Some(400));
    assert_eq!(free(&pool), 49);
    // A request that says that it uses none uses none.
    let pool = said(20_000);
    let leases: Vec<_> = (0..100).map(|_| pool.lease(&tokens(0)).unwrap()).collect();
    assert!(pool.lease(&tokens(20_000)).is_ok());
    drop(leases);
    // The average follows what is used.
    let pool = said(20_000);
    (0..100).for_each(|_| serve(&pool, &Traits::new(), Some(100)));
    assert_eq!(free(&pool), 100);
}

/// Nothing is known of the tokens before the first answer, and from then on they are paced.
#[tokio::test(start_paused = true)]
async fn token_headers_pace_requests_without_an_estimate() {
    let client = service_fn(async |_: Request<String>| {
        let response = Response::builder()
            .header("x-ratelimit-limit-requests", "1000")
            .header("x-ratelimit-remaining-requests", "999")
            .header("x-ratelimit-reset-requests", "60ms")
            .header("x-ratelimit-limit-tokens", "40000")
            .header("x-ratelimit-remaining-tokens", "20000")
            .header("x-ratelimit-reset-tokens", "2000s");
        io::Result::Ok(response.body(String::new()).unwrap())
    });
    let pool = keys(1).paced().build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(client);
    let send = async || client.clone().oneshot(request(Traits::new(), 200, Frames::of(0))).await;
    let first = send().await.unwrap();
    assert!(first.extensions().get::<Reservation>().is_some(), "the number in flight is limited");
    // The first of them finds out what is left.
    drop(send().await.unwrap());
    let leases = free(&pool);
    // 20 guesses of 1,000 tokens are left, less what is kept for others, who seem to use the same key.
    assert!((1..=20).contains(&leases), "{leases}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_ends_lets_a_waiting_request_go() {
    let pool = keys(1).paced().build().unwrap();
    let mut bodies = Vec::new();
    for _ in 0..8 {
        bodies.push(send(&pool, Way::Failover, Traits::new(), 200, Frames::of(1)).await.unwrap().into_body());
    }
    let leases: Vec<_> = std::iter::from_fn(|| pool.lease(&Traits::new()).ok()).collect();
    assert_eq!(leases.len(), 4);
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.lease_within(&Traits::new(), MINUTE).await.map(drop) }
    });
    tokio::time::sleep(SECOND).await;
    assert!(!waits.is_finished());
    let began = tokio::time::Instant::now();
    bodies.pop();
    waits.await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_millis(5));
}
