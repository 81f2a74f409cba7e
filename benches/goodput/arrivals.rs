//! The requests of a run: their times, models and tokens.

use std::f64::consts::TAU;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use crate::service::{Limits, MODELS, ServiceKind};

/// Median, standard deviation of the logarithm, and maximum of the tokens of a request.
const INPUT: (f64, f64, f64) = (500.0, 1.0, 8_000.0);
const OUTPUT: (f64, f64, f64) = (300.0, 0.8, 4_000.0);

/// A request. Times are in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) arrives: f64,
    /// A random number that chooses the process. All processes get the same share of the requests.
    pub(crate) lot: usize,
    pub(crate) model: usize,
    /// The tokens of the request.
    pub(crate) input: f64,
    /// The tokens of the response, which are not known before its end.
    pub(crate) output: f64,
    /// The client's estimate of the tokens of the request, at most 10 % off.
    pub(crate) estimate: f64,
    /// The time that the service needs for the response.
    pub(crate) work: f64,
}

impl Job {
    /// Returns the time from the service's decision until the client has the head of the response.
    pub(crate) fn until_head(&self) -> f64 {
        0.01 + 0.4 * self.work
    }

    /// Returns the time from the head of the response until the end of its body.
    pub(crate) fn body(&self) -> f64 {
        0.6 * self.work
    }
}

/// Returns the mean tokens of a request and its response.
pub(crate) fn mean_tokens() -> f64 {
    let mean = |(median, deviation, _): (f64, f64, f64)| median * (deviation * deviation / 2.0).exp();
    mean(INPUT) + mean(OUTPUT)
}

/// Returns Poisson arrivals at `load` times the capacity of the service.
///
/// One of the models is in demand, and gets three of four requests, until the other one is: after half a minute, or after
/// a day. So from a load of two thirds on, one of the models gets more requests than its limits allow.
pub(crate) fn poisson(kind: ServiceKind, load: f64, seconds: f64, seed: u64) -> Vec<Job> {
    let mut rng = Rng::with_seed(seed);
    let rate = load * Limits::new(kind).capacity();
    let mut jobs = Vec::new();
    let mut now = exponential(&mut rng) / rate;
    while now < seconds {
        let in_demand = (now / kind.shift()) as usize % MODELS;
        let input = tokens(&mut rng, INPUT);
        jobs.push(Job {
            arrives: if kind == ServiceKind::Bursts { (now / 60.0).floor() * 60.0 } else { now },
            lot: rng.usize(..),
            model: if rng.bool() { in_demand } else { rng.usize(..MODELS) },
            input,
            output: tokens(&mut rng, OUTPUT),
            estimate: (input * (0.9 + 0.2 * rng.f64())).ceil(),
            work: 0.3 + 1.2 * rng.f64(),
        });
        now += exponential(&mut rng) / rate;
    }
    jobs
}

fn exponential(rng: &mut Rng) -> f64 {
    -(1.0 - rng.f64()).ln()
}

fn tokens(rng: &mut Rng, (median, deviation, most): (f64, f64, f64)) -> f64 {
    let normal = (2.0 * exponential(rng)).sqrt() * (TAU * rng.f64()).cos();
    (median * (deviation * normal).exp()).clamp(1.0, most).round()
}
