//! How fairly machines share a host: by their weights, within their caps, and what a bad neighbour does to the others.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{figures::median, home::Home, machine};

/// What to measure with.
#[derive(Args)]
pub struct SharesArgs {
    /// The image
    #[arg(long, default_value = "debian")]
    image: String,
    /// For how many seconds each time
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Fail where a figure is further off than is promised (SPECIFICATION.md)
    #[arg(long)]
    check: bool,
}

/// Busy on each of two processors, until it is killed.
const BUSY: &str = "systemd-run -q -u busy sh -c 'while :; do :; done & while :; do :; done'";
/// How far off a share, or a cap, may be.
const OFF: f64 = 0.05;
/// Of so many measurements the median counts.
const MEASUREMENTS: usize = 3;
/// A neighbour makes a request so many times as long at most.
const SLOWER: f64 = 1.3;

/// What makes a neighbour a bad one: each in a unit of its own, until that is stopped.
const NEIGHBOURS: [(&str, &str); 4] = [
    ("a memory hog", "while :; do head -c 400M /dev/zero | tail > /dev/null; done"),
    ("a fork bomb", "b() { b | b & }; while :; do b; sleep 1; done"),
    ("a disk flooder", "while :; do dd if=/dev/zero of=/var/tmp/flood bs=1M count=200 oflag=direct; done"),
    ("a network flooder", "while :; do head -c 100M /dev/zero > /dev/udp/10.0.2.2/9; done"),
];

/// Measures all of it.
pub fn run(args: &SharesArgs) -> Result<()> {
    machine::build()?;
    let mut home = Home::new()?;
    home.purlin(&["image", "build", &args.image])?;
    let bench = Bench { home: &home, args };
    bench.weights()?;
    bench.cap()?;
    bench.neighbours()?;
    home.end()
}

struct Bench<'a> {
    home: &'a Home,
    args: &'a SharesArgs,
}

impl Bench<'_> {
    fn launch(&self, name: &str, options: &[&str]) -> Result<()> {
        self.home.purlin(&[&["launch", &self.args.image, name][..], options].concat())?;
        self.home.exec(name, "systemctl is-system-running --wait; true")?;
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.home.purlin(&["delete", "-f", name]).map(drop)
    }

    /// CPU time of some machines while they run side by side, as parts of one processor.
    fn use_of<const N: usize>(&self, names: [&str; N]) -> Result<[f64; N]> {
        let look = || -> Result<Vec<f64>> {
            let used =
                |name: &&str| Ok(self.home.info(name)?["process"]["usage"]["cpu_ms"].as_f64().unwrap_or_default());
            names.iter().map(used).collect()
        };
        // Until the guest is at it.
        thread::sleep(Duration::from_secs(3));
        let (begin, before) = (Instant::now(), look()?);
        thread::sleep(Duration::from_secs(self.args.seconds));
        let (took, after) = (begin.elapsed().as_secs_f64() * 1000.0, look()?);
        Ok(std::array::from_fn(|i| (after[i] - before[i]) / took))
    }

    fn check(&self, is_so: bool, what: &str) -> Result<()> {
        ensure!(is_so || !self.args.check, "further off than is promised: {what}");
        Ok(())
    }

    /// Two machines with weights of two to one.
    fn weights(&self) -> Result<()> {
        self.launch("heavy", &["--cpus", "2", "--cpu-shares", "200"])?;
        self.launch("light", &["--cpus", "2", "--cpu-shares", "100"])?;
        for name in ["heavy", "light"] {
            self.home.exec(name, BUSY)?;
        }
        let mut ratios = Vec::new();
        for _ in 0..MEASUREMENTS {
            let [heavy, light] = self.use_of(["heavy", "light"])?;
            println!("weights of 2:1: {heavy:.2} and {light:.2} processors, {:.2}:1", heavy / light);
            ratios.push(heavy / light);
        }
        let ratio = median(ratios);
        self.check((ratio / 2.0 - 1.0).abs() <= OFF, "the ratio")?;
        self.delete("heavy")?;
        self.delete("light")
    }

    /// One with a cap of half a processor.
    fn cap(&self) -> Result<()> {
        self.launch("capped", &["--cpus", "2", "--cpu-cap", "50"])?;
        self.home.exec("capped", BUSY)?;
        let [used] = self.use_of(["capped"])?;
        println!("a cap of 0.50 processors: {used:.3}");
        self.check((used / 0.5 - 1.0).abs() <= OFF, "the cap")?;
        self.delete("capped")
    }

    /// A server's answers, alone and beside a machine that takes what it can get.
    fn neighbours(&self) -> Result<()> {
        self.launch("server", &["--publish", "127.0.0.1:0:80"])?;
        self.launch("neighbour", &["--cpus", "2", "--memory", "512M", "--memory-max", "1G"])?;
        self.home.exec("server", "cd /etc && systemd-run -q -d python3 -m http.server 80")?;
        let published = self.home.info("server")?["process"]["published"][0].as_str().map(str::to_owned);
        let published = published.context("nothing is published")?;
        let address: SocketAddr = published.rsplit_once(':').map_or(&*published, |(address, _)| address).parse()?;
        self.home.wait("server", "it serves", |_| Ok(request(address).is_ok()))?;
        self.requests(address)?;
        for (what, script) in NEIGHBOURS {
            // In turn with those alone: what else the host does is in both.
            let (mut alone, mut beside) = (Vec::new(), Vec::new());
            for _ in 0..MEASUREMENTS {
                alone.push(self.requests(address)?);
                let start = ["exec", "neighbour", "--", "systemd-run", "-q", "-u", "bad", "bash", "-c", script];
                self.home.purlin(&start)?;
                thread::sleep(Duration::from_secs(2));
                beside.push(self.requests(address)?);
                // One that has no process left to be asked is started anew.
                let stopped = self
                    .home
                    .command(&["exec", "neighbour", "--", "systemctl", "kill", "-s", "KILL", "bad"])
                    .status()?;
                if !stopped.success() {
                    self.home.purlin(&["stop", "-f", "neighbour"])?;
                    self.home.purlin(&["start", "neighbour"])?;
                    self.home.exec("neighbour", "systemctl is-system-running --wait; true")?;
                }
                self.home.exec("neighbour", "systemctl reset-failed bad; true")?;
            }
            let (alone, beside) = (median(alone), median(beside));
            let slower = beside / alone;
            println!("beside {what}: a request takes {beside:.2} ms, {alone:.2} alone: {slower:.2} times");
            self.check(slower <= SLOWER, what)?;
        }
        self.delete("server")?;
        self.delete("neighbour")
    }

    /// The median time of requests, in milliseconds.
    fn requests(&self, address: SocketAddr) -> Result<f64> {
        let (begin, mut times) = (Instant::now(), Vec::new());
        while begin.elapsed() < Duration::from_secs(self.args.seconds / 4) {
            let begin = Instant::now();
            request(address)?;
            times.push(begin.elapsed().as_secs_f64() * 1000.0);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(median(times))
    }
}

fn request(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains("200 OK"), "{answer:?}");
    Ok(())
}
