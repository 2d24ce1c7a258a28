//! The table of leaves that a vCPU answers CPUID from.

use super::{
    CpuModel, CpuidEntry, HostCpuid, Vendor,
    features::{Features, features, l1_edx},
};
use crate::x86_64::regs::xcr0;

/// Frequency of the local APIC's timer before its divider in kHz, with both engines (KVM's is fixed at 1 GHz).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Highest leaves.
const MAX_BASIC: u32 = 0x16;
const MAX_EXTENDED_INTEL: u32 = 0x8000_0008;
const MAX_EXTENDED_AMD: u32 = 0x8000_0021;

/// The leaves of the vCPU with the given APIC ID, one of `vcpus` in a package, on a host that answers `host`.
/// `tsc_khz` is the frequency of the guest's TSC.
///
/// Vendor and address width are the host's in every model: a guest patches itself for the vendor, and a physical
/// address cannot be wider than the host's.
pub fn leaves(model: CpuModel, host: HostCpuid, apic_id: u32, vcpus: u32, tsc_khz: u32) -> Vec<CpuidEntry> {
    let table = Table {
        model,
        host,
        vendor: Vendor::of(host(0, 0)),
        features: features(model, host),
        apic_id,
        vcpus: vcpus.max(1),
        tsc_khz,
        entries: Vec::new(),
    };
    table.build()
}

struct Table<'a> {
    model: CpuModel,
    host: HostCpuid<'a>,
    vendor: Vendor,
    features: Features,
    apic_id: u32,
    vcpus: u32,
    tsc_khz: u32,
    entries: Vec<CpuidEntry>,
}

impl Table<'_> {
    fn build(mut self) -> Vec<CpuidEntry> {
        self.basic();
        self.topology();
        self.xsave();
        self.frequency();
        self.hypervisor();
        self.extended();
        if self.vendor == Vendor::Amd {
            self.extended_amd();
        }
        self.entries.sort_by_key(|e| (e.leaf, e.subleaf));
        self.entries
    }

    fn leaf(&mut self, leaf: u32, values: [u32; 4]) {
        self.entry(leaf, None, values);
    }

    fn subleaf(&mut self, leaf: u32, subleaf: u32, values: [u32; 4]) {
        self.entry(leaf, Some(subleaf), values);
    }

    fn entry(&mut self, leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx });
    }

    /// Bits of an APIC ID that tell the processors of the package apart.
    fn id_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    /// Family, model and stepping as leaf 1 has them: the host's, or for the named levels family 15, model 107,
    /// stepping 1, which no kernel takes for a processor with a known erratum.
    fn signature(&self) -> u32 {
        match self.model {
            CpuModel::Host => (self.host)(1, 0)[0],
            _ => 0x0006_0fb1,
        }
    }

    fn basic(&mut self) {
        let [_, ebx, ecx, edx] = (self.host)(0, 0);
        self.leaf(0, [MAX_BASIC, ebx, ecx, edx]);

        let f = self.features;
        let clflush_line = 8; // of 8 bytes
        let ids = if self.vcpus > 1 { 1 << self.id_bits() } else { 1 };
        let htt = if self.vcpus > 1 { l1_edx::HTT } else { 0 };
        let ebx = (self.apic_id & 0xff) << 24 | (ids & 0xff) << 16 | clflush_line << 8;
        self.leaf(1, [self.signature(), ebx, f.l1_ecx, f.l1_edx | htt]);

        if self.vendor == Vendor::Intel {
            // Descriptors 0xff and 0xfe: see leaf 4 for the caches, no information on the TLBs. 0xf0: 64-byte prefetch.
            self.leaf(2, [0x00fe_ff01, 0xf0, 0, 0]);
        }
        let arat = 1 << 2; // the APIC timer never stops
        self.leaf(6, [arat, 0, 0, 0]);
        self.subleaf(7, 0, [1, f.l7_ebx, f.l7_ecx, f.l7_edx]);
        self.subleaf(7, 1, [f.l7_1_eax, 0, 0, 0]);
    }

    /// One package with a core for each vCPU, its first and second caches private, the third shared.
    fn topology(&mut self) {
        let bits = self.id_bits();
        for (i, cache) in self.caches().into_iter().enumerate() {
            let sharing = if cache.level() >= 3 { (1 << bits) - 1 } else { 0 };
            let [eax, ebx, ecx, edx] = cache.0;
            let eax = eax & 0x0000_03ff | sharing << 14;
            match self.vendor {
                Vendor::Intel => self.subleaf(4, i as u32, [eax | ((1 << bits) - 1) << 26, ebx, ecx, edx]),
                Vendor::Amd => self.subleaf(0x8000_001d, i as u32, [eax, ebx, ecx, edx]),
            }
        }
        // Level types: 1 SMT, 2 core.
        self.subleaf(0xb, 0, [0, 1, 0x100, self.apic_id]);
        self.subleaf(0xb, 1, [bits, self.vcpus, 0x201, self.apic_id]);
        self.subleaf(0xb, 2, [0, 0, 2, self.apic_id]);
    }

    /// The caches in leaf 4's format, which AMD's leaf 0x8000_001d shares: the host's, or for the named levels a fixed
    /// set.
    fn caches(&self) -> Vec<Cache> {
        let leaf = match self.vendor {
            Vendor::Intel => 4,
            Vendor::Amd => 0x8000_001d,
        };
        let max = (self.host)(leaf & 0x8000_0000, 0)[0];
        if self.model == CpuModel::Host && max >= leaf {
            let found: Vec<_> =
                (0..8).map(|i| Cache((self.host)(leaf, i))).take_while(|c| c.0[0] & 0x1f != 0).collect();
            if !found.is_empty() {
                return found;
            }
        }
        FIXED_CACHES.to_vec()
    }

    fn xsave(&mut self) {
        if !self.features.has_xsave() {
            return;
        }
        let mut xcr0 = xcr0::X87 | xcr0::SSE;
        if self.features.has_avx() {
            xcr0 |= xcr0::AVX;
        }
        if self.features.has_avx512() {
            xcr0 |= xcr0::AVX512;
        }
        // Sizes and offsets are the host's: its XSAVE writes the area (AMD's have no gap where Intel's had MPX).
        let components: Vec<_> = (2..63).filter(|i| xcr0 & 1 << i != 0).map(|i| (i, (self.host)(0xd, i))).collect();
        let legacy = 512 + 64;
        let size = components.iter().map(|(_, [size, offset, ..])| size + offset).max().unwrap_or(0).max(legacy);
        let compacted = components.iter().fold(legacy, |end, (_, [size, _, flags, _])| {
            let start = if flags & 2 != 0 { end.next_multiple_of(64) } else { end };
            start + size
        });
        self.subleaf(0xd, 0, [xcr0 as u32, size, size, 0]);
        self.subleaf(0xd, 1, [self.features.xsave, compacted, 0, 0]);
        for (i, [size, offset, flags, _]) in components {
            self.subleaf(0xd, i, [size, offset, flags & 2, 0]);
        }
    }

    /// Leaves 0x15 and 0x16. The "crystal" is the APIC timer's clock, as an operating system takes it to be.
    fn frequency(&mut self) {
        let divisor = gcd(self.tsc_khz, APIC_BUS_KHZ).max(1);
        let (numerator, denominator) = (self.tsc_khz / divisor, APIC_BUS_KHZ / divisor);
        // Linux multiplies in 32 bits: where the product does not fit, the ratio is left out (EBX 0 says so).
        if numerator.checked_mul(APIC_BUS_KHZ).is_some() && numerator != 0 {
            self.leaf(0x15, [denominator, numerator, APIC_BUS_KHZ * 1000, 0]);
        } else {
            self.leaf(0x15, [0; 4]);
        }
        let mhz = self.tsc_khz / 1000;
        self.leaf(0x16, [mhz, mhz, 100, 0]);
    }

    /// KVM's leaves, and the one with frequencies that VMware defined and KVM shares.
    fn hypervisor(&mut self) {
        const CLOCKSOURCE2: u32 = 1 << 3;
        const CLOCKSOURCE_STABLE: u32 = 1 << 24;
        let [ebx, ecx, edx] = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
        self.leaf(0x4000_0000, [0x4000_0010, ebx, ecx, edx]);
        self.leaf(0x4000_0001, [CLOCKSOURCE2 | CLOCKSOURCE_STABLE, 0, 0, 0]);
        self.leaf(0x4000_0010, [self.tsc_khz, APIC_BUS_KHZ, 0, 0]);
    }

    fn extended(&mut self) {
        let f = self.features;
        let amd = self.vendor == Vendor::Amd;
        let [_, ebx, ecx, edx] = (self.host)(0, 0);
        match self.vendor {
            Vendor::Intel => self.leaf(0x8000_0000, [MAX_EXTENDED_INTEL, 0, 0, 0]),
            Vendor::Amd => self.leaf(0x8000_0000, [MAX_EXTENDED_AMD, ebx, ecx, edx]),
        }
        let mut e1_ecx = f.e1_ecx;
        if self.vcpus == 1 {
            e1_ecx &= !super::features::e1_ecx::CMP_LEGACY;
        }
        let repeated = if amd { f.l1_edx & l1_edx::REPEATED } else { 0 };
        let signature = if amd { self.signature() } else { 0 };
        self.leaf(0x8000_0001, [signature, 0, e1_ecx, f.e1_edx | repeated]);
        self.brand();
        if !amd {
            let l2_256k_8way = 0x0100_6040;
            self.leaf(0x8000_0006, [0, 0, l2_256k_8way, 0]);
        }
        // The guest's TSC is the host's.
        let invariant_tsc = match (self.host)(0x8000_0000, 0)[0] {
            0x8000_0007.. => (self.host)(0x8000_0007, 0)[3] & 1 << 8,
            _ => 0,
        };
        self.leaf(0x8000_0007, [0, 0, 0, invariant_tsc]);

        let physical = match (self.host)(0x8000_0000, 0)[0] {
            0x8000_0008.. => (self.host)(0x8000_0008, 0)[0] & 0xff,
            _ => 36,
        };
        let linear = 48;
        let cores = if amd { (self.vcpus - 1) & 0xff | self.id_bits() << 12 } else { 0 };
        self.leaf(0x8000_0008, [physical | linear << 8, f.e8_ebx, cores, 0]);
    }

    /// Leaves 0x8000_0002 to 4: a name of 48 bytes.
    fn brand(&mut self) {
        if self.model == CpuModel::Host && (self.host)(0x8000_0000, 0)[0] >= 0x8000_0004 {
            for leaf in 0x8000_0002..=0x8000_0004 {
                self.leaf(leaf, (self.host)(leaf, 0));
            }
            return;
        }
        let mut name = [0; 48];
        let text = format!("Purlin virtual processor ({})", self.model);
        name[..text.len()].copy_from_slice(text.as_bytes());
        for (leaf, piece) in (0x8000_0002..).zip(name.chunks(16)) {
            let word = |i: usize| u32::from_le_bytes([piece[i], piece[i + 1], piece[i + 2], piece[i + 3]]);
            self.leaf(leaf, [word(0), word(4), word(8), word(12)]);
        }
    }

    fn extended_amd(&mut self) {
        let host_model = self.model == CpuModel::Host;
        for (leaf, fixed) in [(0x8000_0005, FIXED_L1_AMD), (0x8000_0006, FIXED_L2_AMD), (0x8000_001a, [0; 4])] {
            let values = if host_model { (self.host)(leaf, 0) } else { fixed };
            self.leaf(leaf, values);
        }
        // One thread a core (EBX), one node a package (ECX).
        self.leaf(0x8000_001e, [self.apic_id, self.apic_id & 0xff, 0, 0]);
        self.leaf(0x8000_0021, [self.features.e21_eax, 0, 0, 0]);
    }
}

/// A cache as leaf 4 describes it: type in EAX 4:0, level in 7:5, line, partitions and ways in EBX, sets in ECX, each
/// less one.
#[derive(Clone, Copy)]
struct Cache([u32; 4]);

impl Cache {
    fn level(self) -> u32 {
        self.0[0] >> 5 & 7
    }

    const fn new(kind: u32, level: u32, ways: u32, sets: u32) -> Self {
        let (self_initializing, line) = (1 << 8, 64);
        Self([kind | level << 5 | self_initializing, (line - 1) | (ways - 1) << 22, sets - 1, 0])
    }
}

/// 32 KiB of data, 32 KiB of code, 512 KiB, 16 MiB.
const FIXED_CACHES: [Cache; 4] =
    [Cache::new(1, 1, 8, 64), Cache::new(2, 1, 8, 64), Cache::new(3, 2, 8, 1024), Cache::new(3, 3, 16, 16384)];
/// The same for leaves 0x8000_0005 and 0x8000_0006, with TLBs of 64 and 1,024 entries.
const FIXED_L1_AMD: [u32; 4] = [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140];
const FIXED_L2_AMD: [u32; 4] = [0x6400_6400, 0x6400_6400, 0x0200_6140, 0x0080_8140];

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{lookup, physical_bits, vendor},
        *,
    };

    /// A Zen 4 processor as it answers under a hypervisor.
    fn zen4(leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (0, _) => [0x1c, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            (1, _) => [0x00a1_0f11, 0x0102_0800, 0xfffa_3203, 0x178b_fbff],
            (7, 0) => [1, 0xf1bf_07ab, 0x0040_5fc6, 0x10],
            (7, 1) => [0x20, 0, 0, 0],
            (0xd, 0) => [0xe7, 0x980, 0x980, 0],
            (0xd, 1) => [0xf, 0x9a8, 0x1800, 0],
            (0xd, 2) => [0x100, 0x240, 0, 0],
            (0xd, 5) => [0x40, 0x340, 0, 0],
            (0xd, 6) => [0x200, 0x380, 0, 0],
            (0xd, 7) => [0x400, 0x580, 0, 0],
            (0x8000_0000, _) => [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            (0x8000_0001, _) => [0x00a1_0f11, 0x4000_0000, 0x0040_03f3, 0x2fd3_fbff],
            (0x8000_0007, _) => [0, 0, 0, 0x1100],
            (0x8000_0008, _) => [0x0030_3030, 0x5002_0005, 0x7001, 0],
            (0x8000_001d, 0) => [0x121, 0x01c0_003f, 0x3f, 0],
            (0x8000_001d, 3) => [0x4163, 0x03c0_003f, 0x7fff, 1],
            (0x8000_001d, 1) => [0x122, 0x01c0_003f, 0x3f, 0],
            (0x8000_001d, 2) => [0x143, 0x01c0_003f, 0x7ff, 2],
            (0x8000_0021, _) => [0x204, 0, 0x86, 0],
            _ => [0; 4],
        }
    }

    /// A Haswell as far as its flags go.
    fn haswell(leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (0, _) => [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (1, _) => [0x0003_06c3, 0, 0x7fda_fbff, 0xbfeb_fbff],
            (7, 0) => [0, 0x2fbb, 0, 0],
            (0xd, 0) => [7, 0x340, 0x340, 0],
            (0xd, 1) => [1, 0, 0, 0],
            (0xd, 2) => [0x100, 0x240, 0, 0],
            (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 0x21, 0x2c10_0800],
            (0x8000_0008, _) => [0x3027, 0, 0, 0],
            _ => [0; 4],
        }
    }

    fn table(model: CpuModel, vcpus: u32, apic_id: u32) -> Vec<CpuidEntry> {
        leaves(model, &zen4, apic_id, vcpus, 2_600_000)
    }

    #[test]
    fn the_host_model_is_the_host_less_what_is_not_offered() {
        let t = table(CpuModel::Host, 1, 0);
        assert_eq!(vendor(&t), Vendor::Amd);
        assert_eq!(physical_bits(&t), 48);
        let [eax, _, ecx, edx] = lookup(&t, 1, 0);
        assert_eq!(eax, 0x00a1_0f11);
        // The host's without PCID (17) and OSXSAVE (27), which is the engine's.
        assert_eq!(ecx, 0xfffa_3203 & !(1 << 17 | 1 << 27));
        assert_eq!(edx, 0x078b_fbff);
        let [_, ebx, ecx, edx] = lookup(&t, 7, 0);
        assert_eq!(ebx, 0xf1bf_07ab & !(1 << 10), "all but INVPCID");
        assert_eq!(ecx, 0x0040_5fc6 & !(1 << 7), "all but shadow stacks");
        assert_eq!(edx, 1 << 4);
        assert_eq!(lookup(&t, 0x8000_0007, 0)[3], 1 << 8);
        // The TSC of a host that does not say so is no better for a guest.
        assert_eq!(lookup(&leaves(CpuModel::Host, &haswell, 0, 1, 1), 0x8000_0007, 0)[3], 0);
    }

    #[test]
    fn never_offered() {
        let everything = |leaf, subleaf| match leaf {
            1 | 7 | 0x8000_0001 => [!0; 4],
            _ => zen4(leaf, subleaf),
        };
        let t = leaves(CpuModel::Host, &everything, 0, 1, 2_600_000);
        let [_, _, ecx1, _] = lookup(&t, 1, 0);
        for bit in [3, 5, 6, 17, 27] {
            assert_eq!(ecx1 & 1 << bit, 0, "MONITOR, VMX, SMX, PCID, OSXSAVE: {bit}");
        }
        let [_, ebx7, ecx7, edx7] = lookup(&t, 7, 0);
        assert_eq!(ebx7 & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 10), 0, "HLE, RTM, MPX, INVPCID");
        assert_eq!(ecx7 & (1 << 3 | 1 << 7 | 1 << 16), 0, "PKU, CET_SS, LA57");
        assert_eq!(edx7 & (1 << 20), 0, "CET_IBT");
        let [_, _, ecx, edx] = lookup(&t, 0x8000_0001, 0);
        assert_eq!(ecx & (1 << 2 | 1 << 11 | 1 << 15 | 1 << 16 | 1 << 21), 0, "SVM, XOP, LWP, FMA4, TBM");
        assert_eq!(edx & (1 << 31 | 1 << 30), 0, "3DNow!");
    }

    #[test]
    fn levels_have_their_flags_and_no_higher_ones() {
        let (v2, v3, v4) = (table(CpuModel::V2, 1, 0), table(CpuModel::V3, 1, 0), table(CpuModel::V4, 1, 0));
        assert_eq!(lookup(&v2, 1, 0)[2], 0x81b8_2201, "SSE3..4.2, CX16, x2APIC, POPCNT, deadline, hypervisor");
        assert!(lookup(&v2, 0xd, 0) == [0; 4], "no XSAVE in v2");
        let avx2 = 1 << 5;
        assert_eq!((lookup(&v2, 7, 0)[1] & avx2, lookup(&v3, 7, 0)[1] & avx2), (0, avx2));
        assert_eq!(lookup(&v3, 0xd, 0), [7, 0x340, 0x340, 0]);
        assert_eq!(lookup(&v4, 0xd, 0), [0xe7, 0x980, 0x980, 0]);
        assert_eq!(lookup(&v4, 0xd, 1), [7, 0x980, 0, 0]);
        let pointers = |table: &[CpuidEntry]| lookup(table, 0x8000_0008, 0)[1];
        assert_eq!([&v2, &v3, &v4].map(|table| pointers(table)), [0, 4, 4], "XSAVEERPTR");
        assert_eq!(pointers(&leaves(CpuModel::V3, &haswell, 0, 1, 1)), 0, "which is AMD's");
        // A level's flags do not depend on what else the host has.
        assert_eq!(lookup(&leaves(CpuModel::V3, &haswell, 0, 1, 1), 1, 0)[2], lookup(&v3, 1, 0)[2]);
        assert_eq!(lookup(&leaves(CpuModel::V3, &haswell, 0, 1, 1), 7, 0), lookup(&v3, 7, 0));
    }

    #[test]
    fn topology_is_one_package() {
        let t = table(CpuModel::V3, 3, 2);
        let [_, ebx, _, edx] = lookup(&t, 1, 0);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff, edx >> 28 & 1), (2, 4, 1));
        assert_eq!(lookup(&t, 0xb, 0), [0, 1, 0x100, 2]);
        assert_eq!(lookup(&t, 0xb, 1), [2, 3, 0x201, 2]);
        assert_eq!(lookup(&t, 0x8000_0008, 0)[2], 2 | 2 << 12);
        assert_eq!(lookup(&t, 0x8000_001e, 0)[0..3], [2, 2, 0]);
        let sharing = |i| lookup(&t, 0x8000_001d, i)[0] >> 14;
        assert_eq!((sharing(0), sharing(2), sharing(3)), (0, 0, 3));
        let intel = leaves(CpuModel::V3, &haswell, 2, 3, 2_600_000);
        assert_eq!(lookup(&intel, 4, 3)[0], 3 | 3 << 5 | 1 << 8 | 3 << 14 | 3 << 26);
        assert_eq!(lookup(&intel, 4, 4), [0; 4], "the list ends");
    }

    #[test]
    fn frequencies() {
        let t = table(CpuModel::V3, 1, 0);
        let [denominator, numerator, crystal, _] = lookup(&t, 0x15, 0);
        assert_eq!(u64::from(crystal) * u64::from(numerator) / u64::from(denominator), 2_600_000_000);
        assert_eq!(lookup(&t, 0x4000_0010, 0)[..2], [2_600_000, 1_000_000]);
        // A ratio that would overflow in the guest is not given.
        assert_eq!(lookup(&leaves(CpuModel::V3, &zen4, 0, 1, 2_596_129), 0x15, 0), [0; 4]);
    }

    #[test]
    fn kvm_offers_its_clock_and_nothing_else() {
        let t = table(CpuModel::V2, 1, 0);
        let [max, ebx, ecx, edx] = lookup(&t, 0x4000_0000, 0);
        assert_eq!(max, 0x4000_0010);
        let signature: Vec<u8> = [ebx, ecx, edx].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(signature, b"KVMKVMKVM\0\0\0");
        assert_eq!(lookup(&t, 0x4000_0001, 0), [1 << 3 | 1 << 24, 0, 0, 0]);
    }

    #[test]
    fn every_leaf_once() {
        for model in CpuModel::ALL {
            let t = table(model, 4, 1);
            let mut keys: Vec<_> = t.iter().map(|e| (e.leaf, e.subleaf)).collect();
            keys.dedup();
            assert_eq!(keys.len(), t.len());
        }
    }
}
