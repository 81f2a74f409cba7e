//! Several processes that share the limits of their keys through a store, in virtual time. Each pool stands for a process.

mod support;

use std::{
    borrow::Borrow,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use futures_util::future::join_all;
use support::{
    MINUTE, SECOND,
    limited::{Limited, LimitedClient, offer, post},
};
use tokio::time::{Instant, sleep};
use tower::ServiceExt;
use tower_key_rotation::{
    KeyId, KeyLease, KeyPool, KeyPoolBuilder, KeySpec, Quota, RecoveryHandle, Traits,
    classify::{ResponseHead, Verdict},
    store::{
        Heard, KeyStore, Loaded, Mark, MemoryStore, Operation, Recovered, Standing, StoreError, StoreFuture,
    },
};

/// A store of messages that can be away, and takes its time.
#[derive(Clone, Debug, Default)]
struct Store {
    inner: MemoryStore,
    is_away: Arc<AtomicBool>,
    hangs: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
    writes: Arc<AtomicUsize>,
    longest: Arc<AtomicUsize>,
}

impl Store {
    async fn answers(&self) -> Result<(), StoreError> {
        sleep(Duration::from_millis(100)).await;
        while self.hangs.load(SeqCst) {
            sleep(SECOND).await;
        }
        if self.is_away.load(SeqCst) { Err(StoreError::new("away")) } else { Ok(()) }
    }
}

impl KeyStore for Store {
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        self.inner.load(only)
    }
    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        self.inner.merge(mark)
    }
    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.inner.operate(id, operation)
    }
    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        self.inner.sweep()
    }
    fn messages(&self) -> StoreFuture<'_, Option<Vec<Heard>>> {
        Box::pin(async {
            self.reads.fetch_add(1, Relaxed);
            self.answers().await?;
            self.inner.messages().await
        })
    }
    fn publish(&self, process: u64, body: Vec<u8>) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.writes.fetch_add(1, Relaxed);
            self.longest.fetch_max(body.len(), Relaxed);
            self.answers().await?;
            self.inner.publish(process, body).await
        })
    }
}

struct Process {
    pool: KeyPool,
    recovery: RecoveryHandle,
    client: LimitedClient,
}

fn key(id: &str) -> KeySpec {
    KeySpec::new(KeyId::new(id).unwrap(), format!("sk-{id}"))
}

impl Process {
    async fn start(store: &Store, service: &Limited, keys: usize) -> Self {
        Self::with_keys(store, service, (0..keys).map(|place| key(&format!("k{place}")))).await
    }

    async fn with_keys(store: &Store, service: &Limited, keys: impl IntoIterator<Item = KeySpec>) -> Self {
        let builder = keys.into_iter().fold(KeyPool::builder(), |builder, key| builder.key_spec(key));
        Self::build(store, service, builder).await
    }

    async fn build(store: &Store, service: &Limited, builder: KeyPoolBuilder) -> Self {
        let pool = builder.paced().open(store.clone()).await.unwrap();
        let recovery = RecoveryHandle::spawn(&pool);
        Self { client: service.client(&pool, MINUTE), recovery, pool }
    }

    async fn offer(&self, per_second: f64, seconds: f64) -> usize {
        offer(&self.client, per_second, seconds, post).await
    }

    fn in_flight(&self) -> u64 {
        self.pool.scopes().iter().map(|scope| scope.in_flight).sum()
    }

    /// Sends a request by hand, and returns its lease with the head of its answer applied.
    async fn send(&self, service: &Limited, traits: &Traits) -> Option<KeyLease> {
        let lease = self.pool.lease_within(traits, 5 * SECOND).await.ok()?;
        let (head, _) = service.answer(lease.secret().expose()).into_parts();
        lease.answered(&ResponseHead::new(head.status, &head.headers));
        Some(lease)
    }
}

async fn processes<const N: usize>(store: &Store, service: &Limited, keys: usize) -> [Process; N] {
    let mut processes = Vec::new();
    for _ in 0..N {
        processes.push(Process::start(store, service, keys).await);
    }
    processes.try_into().unwrap_or_else(|_| unreachable!())
}

/// How many requests fail if each process sends that many a second.
async fn offer_each(processes: &[impl Borrow<Process>], per_second: f64, seconds: f64) -> usize {
    let offer = |process| Process::offer(Borrow::borrow(process), per_second, seconds);
    join_all(processes.iter().map(offer)).await.into_iter().sum()
}

#[tokio::test(start_paused = true)]
async fn processes_share_a_single_limit() {
    let (store, service) = (Store::default(), Limited::new(5.0, 10.0));
    let processes = processes::<8>(&store, &service, 1).await;
    assert_eq!(offer_each(&processes, 0.65, 200.0).await, 0);
    let refused = service.refused_per_100();
    assert!(refused <= 2.5, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn overload_is_served_at_the_quota() {
    let (store, service) = (Store::default(), Limited::new(1.0, 5.0));
    let processes = processes::<8>(&store, &service, 6).await;
    let start = Instant::now();
    assert_eq!(offer_each(&processes, 1.0, 100.0).await, 0);
    let refused = service.refused_per_100();
    assert!(refused <= 3.0, "{refused}");
    // 800 requests, of which 30 come at once and 6 per second.
    let took = start.elapsed();
    assert!(took < Duration::from_secs(128 + 20), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_shared_without_refusals() {
    let (store, service) = (Store::default(), Limited::new(0.2, 3.0));
    let processes = processes::<10>(&store, &service, 100).await;
    assert_eq!(offer_each(&processes, 1.9, 120.0).await, 0);
    let refused = service.refused_per_100();
    assert!(refused <= 3.0, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn unused_loans_come_back() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let [busy, quiet] = processes(&store, &service, 4).await;
    // Both have traffic, so both hold tokens.
    let (one, two) = tokio::join!(busy.offer(1.0, 20.0), quiet.offer(1.0, 20.0));
    service.count_from_now();
    // Then one has all of it. It needs what the other has borrowed, and what the other owns.
    let start = Instant::now();
    let three = busy.offer(3.8, 120.0).await;
    assert_eq!((one, two, three), (0, 0, 0));
    assert!(start.elapsed() < Duration::from_secs(150), "{:?}", start.elapsed());
    assert!(service.refused_per_100() <= 3.0, "{}", service.refused_per_100());
}

#[tokio::test(start_paused = true)]
async fn a_process_that_joins_gets_its_part() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let before = processes::<2>(&store, &service, 4).await;
    let late = async {
        sleep(MINUTE).await;
        let (start, process) = (Instant::now(), Process::start(&store, &service, 4).await);
        (process.offer(1.2, 60.0).await, start.elapsed())
    };
    let (failed, (failed_late, took)) = tokio::join!(offer_each(&before, 1.2, 120.0), late);
    assert_eq!((failed, failed_late), (0, 0));
    assert!(took < Duration::from_secs(90), "{took:?}");
    assert!(service.refused_per_100() <= 3.0, "{}", service.refused_per_100());
}

#[tokio::test(start_paused = true)]
async fn the_limits_of_a_killed_process_are_taken_over() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let [one, two, killed] = processes(&store, &service, 6).await;
    assert_eq!(killed.offer(1.0, 20.0).await + one.offer(1.0, 5.0).await, 0);
    drop((killed.recovery, killed.pool, killed.client));
    service.count_from_now();
    let start = Instant::now();
    assert_eq!(offer_each(&[one, two], 2.8, 100.0).await, 0);
    // The quota of all six keys is needed.
    assert!(start.elapsed() < Duration::from_secs(130), "{:?}", start.elapsed());
    assert!(service.refused_per_100() <= 3.0, "{}", service.refused_per_100());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_fails_no_request() {
    for keys in [1, 4, 30] {
        let (store, service) = (Store::default(), Limited::new(30.0 / keys as f64, 60.0 / keys as f64));
        let processes = processes::<3>(&store, &service, keys).await;
        let outage = async {
            sleep(30 * SECOND).await;
            store.is_away.store(true, SeqCst);
            sleep(MINUTE).await;
            store.is_away.store(false, SeqCst);
        };
        let (failed, ()) = tokio::join!(offer_each(&processes, 6.0, 150.0), outage);
        assert_eq!(failed, 0, "{keys} keys");
        let refused = service.refused_per_100();
        assert!(refused <= 15.0, "{keys} keys: {refused}");
        service.count_from_now();
        assert_eq!(offer_each(&processes, 6.0, 60.0).await, 0);
        let refused = service.refused_per_100();
        assert!(refused <= 3.0, "{keys} keys, with the store again: {refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_fails_no_request() {
    let (store, service) = (Store::default(), Limited::new(5.0, 10.0));
    let processes = processes::<3>(&store, &service, 2).await;
    assert_eq!(offer_each(&processes, 2.0, 20.0).await, 0);
    store.hangs.store(true, SeqCst);
    let start = Instant::now();
    assert_eq!(offer_each(&processes, 2.0, 60.0).await, 0);
    assert!(start.elapsed() < Duration::from_secs(100), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn pools_go_on_alone_without_their_handles() {
    let (store, service) = (Store::default(), Limited::new(5.0, 10.0));
    let [one, two] = processes(&store, &service, 4).await;
    assert_eq!(offer_each(&[one, two], 3.0, 10.0).await, 0);
    let [stays, alone] = processes(&store, &service, 4).await;
    let (first, second) = tokio::join!(stays.offer(2.0, 10.0), alone.offer(2.0, 10.0));
    drop(alone.recovery);
    drop(stays);
    let start = Instant::now();
    // The quota of all four keys, of which this process owned some.
    let third = offer(&alone.client, 15.0, 60.0, post).await;
    assert_eq!((first, second, third), (0, 0, 0));
    assert!(start.elapsed() < Duration::from_secs(75), "{:?}", start.elapsed());
    drop(alone.pool);
}

#[tokio::test(start_paused = true)]
async fn two_handles_of_a_pool_are_one_process() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let [one, two] = processes(&store, &service, 6).await;
    let more = RecoveryHandle::spawn(&one.pool);
    assert_eq!(offer_each(&[one, two], 2.8, 60.0).await, 0);
    assert!(service.refused_per_100() <= 3.0, "{}", service.refused_per_100());
    assert_eq!(store.inner.messages().await.unwrap().unwrap().len(), 2);
    drop(more);
}

#[tokio::test(start_paused = true)]
async fn wrong_headers_block_no_process() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0).lying());
    let processes = processes::<5>(&store, &service, 10).await;
    let start = Instant::now();
    let failed = offer_each(&processes, 1.5, 100.0).await;
    // Once the headers are ignored, the processes find the limits by refusals: 10 in a row fail a request.
    assert!(failed <= 15, "{failed} of 750");
    assert!(start.elapsed() < Duration::from_secs(160), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn idle_processes_leave_the_store_alone() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let processes = processes::<2>(&store, &service, 4).await;
    sleep(5 * MINUTE).await;
    let count = || (store.reads.load(Relaxed), store.writes.load(Relaxed));
    assert_eq!(count(), (0, 0));
    let start = Instant::now();
    offer_each(&processes, 1.0, 30.0).await;
    let (reads, writes) = count();
    // One of each per process and second.
    let expected = 2.0 * start.elapsed().as_secs_f64();
    for count in [reads, writes] {
        assert!((0.5 * expected..1.2 * expected + 4.0).contains(&(count as f64)), "{count} in {expected}");
    }
    assert!(store.longest.load(Relaxed) < 600, "{} bytes", store.longest.load(Relaxed));
    sleep(2 * MINUTE).await;
    let before = count();
    sleep(5 * MINUTE).await;
    assert_eq!(count(), before);
}

#[tokio::test(start_paused = true)]
async fn a_request_for_one_key_waits_for_no_owner() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let processes = processes::<3>(&store, &service, 4).await;
    assert_eq!(offer_each(&processes, 0.5, 20.0).await, 0);
    for process in &processes {
        for key in 0..4 {
            let mut request = post();
            let key = KeyId::new(format!("k{key}")).unwrap();
            request.extensions_mut().insert(Traits::new().key(key));
            let start = Instant::now();
            assert_eq!(process.client.clone().oneshot(request).await.unwrap(), 200);
            assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
        }
    }
}

/// Which process owns which limit is random: so are the rounds.
const ROUNDS: usize = 12;

#[tokio::test(start_paused = true)]
async fn processes_share_organisations_that_only_some_know() {
    for round in 0..ROUNDS {
        let service = Limited::new(5.0, 10.0).of_one_organisation().answering_after(SECOND);
        let store = Store::default();
        let keys = [format!("a{round}"), format!("b{round}")];
        let keys = || keys.iter().map(|id| key(id));
        let knows = Process::with_keys(&store, &service, keys()).await;
        assert_eq!(knows.offer(1.0, 10.0).await, 0);
        let joins = Process::with_keys(&store, &service, keys()).await;
        service.count_from_now();
        let start = Instant::now();
        assert_eq!(offer_each(&[knows, joins], 1.5, 60.0).await, 0);
        assert!(start.elapsed() < Duration::from_secs(95), "{:?}", start.elapsed());
        assert!(service.refused_per_100() <= 5.0, "{}", service.refused_per_100());
    }
}

#[tokio::test(start_paused = true)]
async fn spare_keys_serve_little_while_preferred_ones_have_room() {
    for round in 0..ROUNDS {
        let (store, service) = (Store::default(), Limited::new(5.0, 20.0));
        let (preferred, mut spare) = (key(&format!("k{round}")), key("spare"));
        spare.tier = Some(1);
        let keys = || [preferred.clone(), spare.clone()];
        let one = Process::with_keys(&store, &service, keys()).await;
        let two = Process::with_keys(&store, &service, keys()).await;
        let processes = [one, two];
        assert_eq!(offer_each(&processes, 1.0, 15.0).await, 0);
        service.count_from_now();
        assert_eq!(offer_each(&processes, 1.0, 60.0).await, 0);
        let spare = 100 * service.served_by("sk-spare") / service.served();
        assert!(spare <= 5, "{spare} %");
        // Without them, the requests would wait.
        assert_eq!(offer_each(&processes, 4.0, 60.0).await, 0);
        assert!(service.served_by("sk-spare") > 50);
    }
}

#[tokio::test(start_paused = true)]
async fn owners_learn_from_answers_that_take_long() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0).answering_after(10 * SECOND));
    let [quiet, busy] = processes(&store, &service, 12).await;
    // One request, so it uses the scope, and knows next to nothing of the limits that it owns.
    assert_eq!(quiet.offer(1.0, 1.0).await, 0);
    let start = Instant::now();
    // All limits are needed.
    assert_eq!(busy.offer(11.0, 60.0).await, 0);
    assert!(start.elapsed() < Duration::from_secs(85), "{:?}", start.elapsed());
    assert!(service.refused_per_100() <= 10.0, "{}", service.refused_per_100());
}

#[tokio::test(start_paused = true)]
async fn f41_loans_of_a_dropped_handle_are_ended() {
    let (store, service) = (Store::default(), Limited::new(20.0, 40.0));
    let [one, two] = processes(&store, &service, 1).await;
    let (clients, pools) = ([one.client.clone(), two.client.clone()], [one.pool.clone(), two.pool.clone()]);
    let offers = join_all(clients.iter().map(|client| offer(client, 5.0, 20.0, post)));
    let drops = async {
        sleep(15 * SECOND).await;
        assert!(one.in_flight() + two.in_flight() > 5, "little is lent");
        drop((one.recovery, two.recovery));
    };
    let (failed, ()) = tokio::join!(offers, drops);
    assert_eq!(failed, [0, 0]);
    for pool in pools {
        let in_flight: u64 = pool.scopes().iter().map(|scope| scope.in_flight).sum();
        assert_eq!(in_flight, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn f41_tokens_outlive_another_name_of_their_limit() {
    for round in 0..ROUNDS {
        let service = Limited::new(1.0, 2.0);
        let store = Store::default();
        let keys = || (0..2).map(|place| key(&format!("k{place}-{round}")));
        let processes = [
            Process::with_keys(&store, &service, keys()).await,
            Process::with_keys(&store, &service, keys()).await,
        ];
        // Too much, so each owner sets tokens aside for itself.
        assert_eq!(offer_each(&processes, 2.0, 15.0).await, 0);
        service.names_organisation();
        assert_eq!(offer_each(&processes, 0.3, 30.0).await, 0);
        // Until nothing is lent any more.
        sleep(90 * SECOND).await;
        for process in &processes {
            assert_eq!(process.in_flight(), 0, "round {round}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cap_counts_bodies_of_requests_with_loans() {
    for round in 0..ROUNDS {
        let (store, service) = (Store::default(), Limited::new(10.0, 20.0));
        let mut capped = key(&format!("k{round}"));
        capped.max_in_flight = NonZeroU32::new(2);
        let processes = [
            Process::with_keys(&store, &service, [capped.clone()]).await,
            Process::with_keys(&store, &service, [capped]).await,
        ];
        assert_eq!(offer_each(&processes, 2.0, 10.0).await, 0);
        for process in &processes {
            let traits = Traits::new();
            let held = [process.send(&service, &traits).await, process.send(&service, &traits).await];
            assert!(held.iter().all(Option::is_some));
            assert!(process.send(&service, &traits).await.is_none());
            drop(held);
            assert!(process.send(&service, &traits).await.is_some());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn owners_hear_what_requests_with_loans_used() {
    for round in 0..ROUNDS {
        let (store, service) = (Store::default(), Limited::new(10.0, 20.0));
        let quota = || {
            KeyPool::builder()
                .key_spec(key(&format!("k{round}")))
                .quota(Quota::per_day(100_000).window().tokens())
        };
        let processes = [
            Process::build(&store, &service, quota()).await,
            Process::build(&store, &service, quota()).await,
        ];
        let few = Traits::new().tokens(10);
        for _ in 0..20 {
            for process in &processes {
                drop(process.send(&service, &few).await.unwrap());
            }
            sleep(SECOND / 2).await;
        }
        for process in &processes {
            let lease = process.send(&service, &few).await.unwrap();
            // The usage is known when the body has ended.
            sleep(20 * SECOND).await;
            lease.used(30_000);
        }
        sleep(5 * SECOND).await;
        let left = |process: &Process| process.pool.scopes()[0].tokens_left.unwrap();
        let least = processes.iter().map(left).fold(f64::INFINITY, f64::min);
        assert!(least < 41_000.0, "round {round}: {least}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_for_one_key_wait_while_it_rests() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0));
    let processes = processes::<2>(&store, &service, 1).await;
    assert_eq!(offer_each(&processes, 0.5, 20.0).await, 0);
    service.close_for(MINUTE);
    let this = Traits::new().key(KeyId::new("k0").unwrap());
    for process in &processes {
        drop(process.send(&service, &this).await.unwrap());
        let error = process.pool.lease(&this).unwrap_err();
        assert!(error.retry_in().is_some_and(|time| time > 50 * SECOND), "{error}");
    }
    let start = Instant::now();
    let waits = processes.iter().map(|process| process.pool.lease_within(&this, 2 * MINUTE));
    for lease in join_all(waits).await {
        lease.unwrap().answered_with(Verdict::Nothing);
    }
    assert!(start.elapsed() > 50 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn tokens_wait_while_their_limit_rests() {
    let (store, service) = (Store::default(), Limited::new(20.0, 10.0));
    let processes = processes::<2>(&store, &service, 1).await;
    let overload = async {
        sleep(15 * SECOND).await;
        service.close_for(30 * SECOND);
        service.count_from_now();
        sleep(20 * SECOND).await;
        service.refused()
    };
    let (_, refused) = tokio::join!(offer_each(&processes, 18.0, 30.0), overload);
    // Those in flight, and the tokens of the other process until it hears of it.
    assert!(refused <= 8, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn distrust_ends_with_the_process_that_found_it() {
    let (store, service) = (Store::default(), Limited::new(1.0, 10.0).lying());
    let mut all = Vec::from(processes::<3>(&store, &service, 10).await);
    offer_each(&all, 1.5, 60.0).await;
    service.lies(false);
    // One after the other is replaced, while requests go on.
    for _ in 0..3 {
        all.remove(0);
        all.push(Process::start(&store, &service, 10).await);
        offer_each(&all, 1.0, 20.0).await;
    }
    let distrusted = |process: &Process| process.pool.scopes()[0].distrusted;
    assert_eq!(all.iter().map(distrusted).collect::<Vec<_>>(), [0; 3]);
}
